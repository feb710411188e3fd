"""Swapping the RNNs of a model, and back: everything that hangs on a module must survive it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from helpers import assert_same
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rnnfast


class Tagger(nn.Module):
    """A model of somebody: an RNN, a cell, the same RNN under a second name, and other modules."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.encoder = nn.ModuleDict({"rnn": nn.RNN(4, 6, 2, batch_first=True, dropout=0.5)})
        self.cell = nn.RNNCell(6, 6, nonlinearity="relu")
        self.same = self.encoder["rnn"]
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        out, _ = self.encoder["rnn"](self.embed(tokens))
        return self.head(self.cell(out[:, -1]))


TOKENS = torch.arange(20).remainder(11).view(4, 5)
NAMES = ["encoder.rnn", "cell"]


def step(model, optimizer):
    optimizer.zero_grad()
    torch.manual_seed(3)  # of the dropout masks
    loss = model(TOKENS).square().sum()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_swapped_model_trains_on_with_the_optimizer_that_it_had(backend, optimizer):
    model = Tagger()
    twin = copy.deepcopy(model)
    ours, theirs = (optimizer(m.parameters(), lr=0.01) for m in (model, twin))
    step(model, ours), step(twin, theirs)
    before = dict(model.named_parameters())
    modules = dict(model.named_modules())

    report = rnnfast.swap(model)
    assert report.changed == NAMES
    assert report.unchanged == {}
    assert type(model.encoder["rnn"]) is rnnfast.RNN
    assert type(model.cell) is rnnfast.RNNCell
    assert model.same is model.encoder["rnn"]
    assert dict(model.named_modules()) == modules
    assert all(before[name] is p for name, p in model.named_parameters())
    for _ in range(3):
        assert_same(step(model, ours), step(twin, theirs), 15, 32)
    assert list(model.state_dict()) == list(twin.state_dict())

    assert rnnfast.restore(model).changed == NAMES
    assert type(model.encoder["rnn"]) is nn.RNN
    assert type(model.cell) is nn.RNNCell
    assert all(before[name] is p for name, p in model.named_parameters())
    assert vars(model.cell).keys() == vars(twin.cell).keys()
    assert_same(step(model, ours), step(twin, theirs), 15, 32)


def test_a_model_that_is_an_rnn_itself(backend):
    model = nn.RNN(3, 5)
    x = torch.randn(4, 2, 3)
    expected = model(x)[0]
    assert rnnfast.swap(model).changed == [""]
    assert type(model) is rnnfast.RNN
    assert isinstance(model, nn.RNNBase)
    assert not isinstance(model, nn.RNN)
    assert_same(model(x)[0], expected, 4, 8)


def test_hooks_and_modes_stay(backend):
    seen = []
    model = nn.Sequential(nn.RNN(3, 5)).eval()
    rnn = model[0]
    rnn.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    rnn.register_forward_hook(lambda m, args, out: seen.append("forward"))
    rnn.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    rnn.register_state_dict_post_hook(lambda m, d, prefix, meta: seen.append("state_dict"))
    rnn.register_load_state_dict_pre_hook(lambda *args: seen.append("load"))
    rnn.weight_hh_l0.requires_grad_(False)
    rnn.register_buffer("steps", torch.tensor(7))
    rnnfast.swap(model)
    assert model[0] is rnn
    assert not rnn.training
    assert rnn.steps == 7
    assert not rnn.weight_hh_l0.requires_grad
    rnn(torch.randn(4, 2, 3, requires_grad=True))[0].sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["pre", "forward", "backward", "state_dict", "load"]


def test_tied_weights_stay_tied(backend):
    model = nn.ModuleDict(dict(a=nn.RNN(5, 5), b=nn.RNN(5, 5)))
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    twin = copy.deepcopy(model)
    assert rnnfast.swap(model).changed == ["a", "b"]
    x = torch.randn(4, 2, 5)
    for m in (model, twin):
        m["b"](m["a"](x)[0])[0].square().sum().backward()
    assert model["b"].weight_hh_l0 is model["a"].weight_hh_l0
    assert_same(model["a"].weight_hh_l0.grad, twin["a"].weight_hh_l0.grad, 8, 8 + 16)


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def test_parametrizations_stay_and_can_be_removed_after(backend):
    model = nn.Sequential(nn.RNN(3, 5))
    parametrize.register_parametrization(model[0], "weight_hh_l0", Halved())
    parametrizations.weight_norm(model[0], "weight_ih_l0")
    twin = copy.deepcopy(model)  # shares the class that the parametrization made
    x = torch.randn(4, 2, 3)
    assert rnnfast.swap(model).changed == ["0"]
    assert isinstance(model[0], rnnfast.RNN)
    assert isinstance(twin[0], nn.RNN)
    assert type(model[0]).__name__ == "ParametrizedRNN"
    swapped_twin = copy.deepcopy(model)
    expected = twin[0](x)[0]
    assert_same(model[0](x)[0], expected, 4, 8)
    assert_same(swapped_twin[0](x)[0], expected, 4, 8)
    parametrize.remove_parametrizations(model[0], "weight_ih_l0")
    assert isinstance(model[0], rnnfast.RNN)
    assert rnnfast.restore(model).changed == ["0"]
    assert isinstance(model[0], nn.RNN)
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert type(model[0]) is nn.RNN
    assert_same(model[0](x)[0], expected, 4, 8)


def test_old_style_weight_norm_stays(backend):
    model = nn.RNN(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model, "weight_hh_l0")
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        model.weight_hh_l0_g.mul_(2)
    expected = model(x)[0]
    rnnfast.swap(model)
    assert_same(model(x)[0], expected, 4, 8)
    nn.utils.remove_weight_norm(model, "weight_hh_l0")
    assert_same(model(x)[0], expected, 4, 8)


class Wrapped(nn.RNN):
    def forward(self, input, hx=None):
        return super().forward(input, hx)[0]


def test_what_is_not_swapped_is_reported_with_the_reason():
    patched = nn.RNN(3, 5)
    patched.forward = lambda x: x
    checked = nn.RNN(3, 5)
    checked.check_input = lambda *args: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.RNN(3, 5))
    model = nn.ModuleDict(
        dict(sub=Wrapped(3, 5), lstm=nn.LSTM(3, 5), gru=nn.GRUCell(3, 5), patched=patched)
        | dict(checked=checked)
        | dict(scripted=scripted, ours=rnnfast.RNN(3, 5), plain=nn.RNN(3, 5), other=nn.Linear(3, 5))
    )
    classes = {name: type(m) for name, m in model.items()}
    report = rnnfast.swap(model)
    assert report.changed == ["plain"]
    reasons = report.unchanged
    assert list(reasons) == ["sub", "lstm", "gru", "patched", "checked", "scripted", "ours"]
    assert "test_swapping.Wrapped is a subclass" in reasons["sub"]
    assert "LSTM is not a cell" in reasons["lstm"]
    assert "GRUCell is not a cell" in reasons["gru"]
    assert "forward is replaced" in reasons["patched"]
    assert "check_input is replaced" in reasons["checked"]
    assert "TorchScript" in reasons["scripted"]
    assert "already" in reasons["ours"]
    assert str(report).splitlines()[0] == "swapped 1 of 8 recurrent modules"
    assert "  lstm (LSTM): not swapped: LSTM is not a cell that rnnfast has" in str(report)
    assert classes | {"plain": rnnfast.RNN} == {name: type(m) for name, m in model.items()}
    restored = rnnfast.restore(model)
    assert restored.changed == ["plain"]
    assert restored.unchanged == {"ours": "rnnfast.swap did not change it"}
    assert classes == {name: type(m) for name, m in model.items()}


def test_swapping_twice_changes_nothing_more():
    model = Tagger()
    rnnfast.swap(model)
    again = rnnfast.swap(model)
    assert again.changed == []
    assert set(again.unchanged) == set(NAMES)
    rnnfast.restore(model)
    assert rnnfast.restore(model).changes == ()


def test_copies_and_pickles_of_a_swapped_model_can_be_restored(backend):
    model = nn.Sequential(nn.RNN(3, 5))
    x = torch.randn(4, 2, 3)
    expected = model[0](x)[0]
    rnnfast.swap(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin[0]) is rnnfast.RNN
        assert_same(twin[0](x)[0], expected, 4, 8)
        rnnfast.restore(twin)
        assert type(twin[0]) is nn.RNN
        assert torch.equal(twin[0](x)[0], expected)


# -------------------------------------------------------------------------------------- patch


def test_patch_nests_and_is_undone_by_exceptions():
    originals = (nn.RNN, nn.RNNCell, nn.modules.RNN)
    with rnnfast.patch():
        assert nn.RNN is torch.nn.modules.RNN is rnnfast.RNN
        with rnnfast.patch():
            assert nn.RNNCell is rnnfast.RNNCell
        assert nn.RNN is rnnfast.RNN
        with pytest.raises(KeyError), rnnfast.patch():
            raise KeyError
        assert nn.RNN is rnnfast.RNN
        model = Tagger()
    assert (nn.RNN, nn.RNNCell, nn.modules.RNN) == originals
    assert type(model.encoder["rnn"]) is rnnfast.RNN
    assert type(model.cell) is rnnfast.RNNCell


def test_within_patch_a_model_of_theirs_can_be_swapped_and_restored():
    model = nn.Sequential(nn.RNN(3, 5), nn.RNNCell(5, 5))
    theirs = [type(m) for m in model]
    with rnnfast.patch():
        assert rnnfast.swap(model).changed == ["0", "1"]
        assert [type(m) for m in model] == [rnnfast.RNN, rnnfast.RNNCell]
        assert rnnfast.restore(model).changed == ["0", "1"]
    assert [type(m) for m in model] == theirs


def test_patched_code_builds_the_same_model(backend):
    torch.manual_seed(0)
    theirs = Tagger().eval()
    with rnnfast.patch():
        torch.manual_seed(0)
        ours = Tagger().eval()
        assert isinstance(ours.same, nn.RNN)
    assert_same(ours(TOKENS), theirs(TOKENS), 15, 32)


def test_within_patch_subclasses_derive_from_ours_and_pickles_of_theirs_work(backend):
    theirs = nn.RNN(3, 5)
    x = torch.randn(4, 2, 3)
    with rnnfast.patch():

        class Local(nn.RNN):
            def __init__(self):
                super().__init__(3, 5)

            def forward(self, input, hx=None):
                return super().forward(input, hx)[0]

        ours = Local()
        assert type(pickle.loads(pickle.dumps(theirs))) is type(theirs)
        assert type(copy.deepcopy(theirs)) is type(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, rnnfast.RNN)
    assert_same(ours(x), theirs(x)[0], 4, 8)
