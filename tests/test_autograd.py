"""What autograd promises of outputs, gradients and graphs beyond their values, as of nn.RNN's."""

import threading

import numpy as np
import pytest
import torch
from helpers import assert_same, pair
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rnnfast

KINDS = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
}


@pytest.fixture(params=KINDS)
def modules(backend, request):
    """nn.RNN and rnnfast.RNN of one kind, in float64, and an input."""
    theirs, ours = pair(3, 5, dtype=torch.float64, **KINDS[request.param])
    return theirs, ours, torch.randn(4, 2, 3, dtype=torch.float64)


def cells(seed=0):
    made = []
    for cell in (nn.RNNCell, rnnfast.RNNCell):
        torch.manual_seed(seed)
        made.append(cell(3, 5))
    return made


def test_states_are_no_views(modules):
    """Truncated backpropagation detaches them in place; a mask may be learned."""
    mask = torch.ones(5, dtype=torch.float64, requires_grad=True)
    for module in modules[:2]:
        _, h_n = module(modules[2])
        h_n.detach_()
        with torch.no_grad():
            _, h_n = module(modules[2])
        h_n.mul_(mask)
        assert h_n.requires_grad


def test_a_cells_state_is_no_view(backend):
    mask = torch.ones(5, requires_grad=True)
    for cell in cells():
        cell(torch.randn(2, 3)).detach_()
        with torch.no_grad():
            h = cell(torch.randn(2, 3))
        h.mul_(mask)
        assert h.requires_grad


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 3), (4, 2, 3)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_state_may_be_changed_before_the_backward(backend, shape, batch_first):
    """As where an episode ends. Of a single step the state is what the backward needs."""
    theirs, ours = pair(3, 5, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    x = x.transpose(0, 1) if batch_first and x.dim() == 3 else x
    gradients = []
    for module in (theirs, ours):
        output, h_n = module(x)
        with torch.no_grad():
            h_n.zero_()
        output.square().sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    for actual, expected in zip(*gradients[::-1], strict=True):
        assert_same(actual, expected, 4, 8)


def test_an_output_without_a_gradient_may_be_changed(compiled):
    """A frozen encoder's, by what is trained. (With a gradient the backward needs it.)"""
    scale = torch.ones(5, requires_grad=True)
    for module in pair(3, 5, batch_first=True):
        with torch.no_grad():
            output, _ = module(torch.randn(2, 4, 3))
        output *= scale
        assert output.requires_grad


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_biases_have_gradients_of_their_own(backend, kind, compile):
    if compile and backend not in ("cpu", "reference"):
        pytest.skip("the graphs are those of the CPU")
    for module in pair(3, 5, **KINDS[kind]):
        biases = [p for name, p in module.named_parameters() if name.startswith("bias")]
        call = torch.compile(module, backend="aot_eager") if compile else module
        gradients = torch.autograd.grad(call(torch.randn(4, 2, 3))[0].sum(), biases)
        assert len({g.data_ptr() for g in gradients}) == len(biases)
        before = gradients[0].clone()
        gradients[1].zero_()
        assert torch.equal(gradients[0], before)


@pytest.mark.parametrize("cell", [False, True])
def test_a_failing_hook_is_called_once(compiled, cell):
    calls = []

    def fail(_):
        calls.append(1)
        raise RuntimeError("no room")

    module = rnnfast.RNNCell(3, 5) if cell else rnnfast.RNN(3, 5, 2, dropout=0.5)
    with (
        torch.autograd.graph.saved_tensors_hooks(fail, fail),
        pytest.raises(RuntimeError, match="no room"),
    ):
        module(torch.randn(2, 3) if cell else torch.randn(4, 2, 3))
    assert len(calls) == 1


def test_what_no_gradient_needs_may_change(modules):
    """With frozen weights, the input and the state after the forward."""
    results = []
    for module in modules[:2]:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.startswith("bias"))
        leaves = [modules[2].clone(), torch.randn_like(module(modules[2])[1])]
        torch.manual_seed(1)
        leaves[1].normal_()
        for leaf in leaves:
            leaf.requires_grad_()
        x, h = (leaf * 1 for leaf in leaves)
        output, _ = module(x, h)
        with torch.no_grad():
            x.zero_()
            h.zero_()
        output.square().sum().backward()
        results.append([leaf.grad for leaf in leaves] + [p.grad for p in module.parameters()])
    for ours, theirs in zip(*results[::-1], strict=True):
        assert_same(ours, theirs, 4, 8)


def test_weights_that_no_gradient_needs_may_change(modules):
    """W_ih is for the input's gradient alone: an optimizer may step before the backward."""
    results = []
    for module in modules[:2]:
        output, _ = module(modules[2])
        with torch.no_grad():
            module.weight_ih_l0.mul_(0.5)
        output.square().sum().backward()
        results.append([p.grad for p in module.parameters()])
    for ours, theirs in zip(*results[::-1], strict=True):
        assert_same(ours, theirs, 4, 8)


def test_a_cells_weights_that_no_gradient_needs_may_change(backend):
    results = []
    x, h = torch.randn(2, 3), torch.randn(2, 5)
    for cell in cells():
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
        losses = [cell(x).sum(), cell(x, h).square().sum()]
        for loss in losses:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([p.detach() for p in cell.parameters()])
    for ours, theirs in zip(*results[::-1], strict=True):
        assert_same(ours, theirs, 2, 8)


def test_weights_that_a_gradient_needs_may_not_change(backend):
    """Not even by mistake: the error is PyTorch's own."""
    x, h = torch.randn(4, 2, 3), torch.randn(1, 2, 5)
    for name, leaf, steps in (("ih", x, 1), ("hh", h, 1), ("hh", None, 4)):
        rnn = rnnfast.RNN(3, 5)
        for tensor in (x, h):
            tensor.requires_grad_(tensor is leaf)
        output, _ = rnn(x[:steps], h)
        with torch.no_grad():
            getattr(rnn, f"weight_{name}_l0").mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_frozen_weights_do_not_keep_the_input(compiled):
    kept = []
    module = rnnfast.RNN(3, 5)
    module.weight_ih_l0.requires_grad_(False)
    x = torch.randn(4, 2, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    assert len(kept) > 0


def test_forward_mode_through_a_backward(modules):
    """The derivative of a vjp along its cotangent is the vjp of the direction."""
    results = []
    for module in modules[:2]:
        run = lambda x, module=module: module(x)[0]  # noqa: E731
        output, vjp = torch.func.vjp(run, modules[2])
        torch.manual_seed(2)
        direction, cotangent = torch.randn_like(output), torch.randn_like(output)
        backward = lambda g, vjp=vjp: vjp(g)[0]  # noqa: E731
        value, along = torch.func.jvp(backward, (cotangent,), (direction,))
        assert_same(along, backward(direction), 4, 8)
        results.append([value, along, torch.func.jacfwd(backward)(cotangent)])

        x = modules[2].clone().requires_grad_()
        output = module(x)[0]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(cotangent, direction)
            gradient = torch.autograd.grad(output, [x, *module.parameters()], dual)
            results[-1] += [forward_ad.unpack_dual(g).tangent for g in gradient]
    for theirs, ours in zip(*results, strict=True):
        assert_same(ours, theirs, 4, 8)


def test_threads_may_walk_one_graph(backend):
    """One of them wins; the others are told that the graph was freed, and nothing worse."""
    module = rnnfast.RNN(3, 8)
    outcomes = []

    def walk(loss):
        try:
            torch.autograd.grad(loss, list(module.parameters()))
            outcomes.append("done")
        except RuntimeError as error:
            outcomes.append(str(error))

    for _ in range(50):
        output, _ = module(torch.randn(4, 2, 3))
        threads = [threading.Thread(target=walk, args=((output * i).sum(),)) for i in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outcomes) == 200
    assert outcomes.count("done") >= 50
    assert all("backward through the graph a second time" in o for o in outcomes if o != "done")


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_autograd(compiled, kind):
    theirs, ours = pair(3, 5, dtype=torch.float64, **KINDS[kind])
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for module in (theirs, ours):
        with torch._dynamo.config.patch(compiled_autograd=True):

            @torch.compile(backend="eager")
            def step(x, module=module):
                loss = module(x)[0].square().sum()
                loss.backward()
                return loss

            step(x)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same(a.grad, b.grad, 4, 8)


# Others may have the memory of a gradient or an output. Each of these returns what it sees of it
# after the backward of `first`, whose output is the input of `second`.


def _the_caller_has_it(first, second, x):
    y, h_n = first(x)
    given = torch.ones_like(y), torch.ones_like(h_n)
    torch.autograd.backward((y, h_n), given)
    return given


def _it_is_retained(first, second, x):
    y, _ = first(x)
    y.retain_grad()
    second(y)[0].square().sum().backward()
    return y, y.grad


def _a_hook_keeps(what):
    def case(first, second, x):
        seen = []
        y, _ = first(x)
        y.register_hook(lambda grad: seen.append(what(grad)))
        second(y)[0].square().sum().backward()
        return seen

    return case


def _a_hook_of_the_node_keeps_it(first, second, x):
    seen = []
    y, _ = first(x)
    y.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))
    y.grad_fn.register_hook(lambda _, grads: seen.append(grads[0]))
    second(y)[0].square().sum().backward()
    return seen


def _the_output_is_kept(how):
    def case(first, second, x):
        y, _ = first(x)
        kept = how(y)
        loss = second(y)[0].square().sum()
        del y
        loss.backward()
        return [torch.as_tensor(kept)]

    return case


def _the_output_is_saved_elsewhere(first, second, x):
    y, h_n = first(x)
    loss = second(y)[0].square().sum() + y.pow(3).sum() + h_n.cos().sum()
    del y, h_n
    loss.backward()
    return []


def _a_leaf_gets_it_too(first, second, x):
    y, _ = first(x)
    before, after = (torch.zeros_like(y, requires_grad=True) for _ in range(2))
    second(before + y + after)[0].square().sum().backward()
    return before.grad, after.grad


def _the_graph_is_kept(first, second, x):
    loss = second(first(x)[0])[0].square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return []


def _it_is_asked_for(first, second, x):
    y, _ = first(x)
    return torch.autograd.grad(second(y)[0].square().sum(), [y, *first.parameters(), x])


def _it_is_differentiated(first, second, x):
    (d_x,) = torch.autograd.grad(second(first(x)[0])[0].square().sum(), x, create_graph=True)
    d_x.square().sum().backward()
    return [d_x]


class _OfAnArray(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, array):
        ctx.array = array
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(ctx.array), None


def _it_is_an_array(first, second, x):
    y, _ = first(x)
    array = np.ones(y.shape)
    _OfAnArray.apply(y, array).backward()
    return [torch.tensor(array)]


def _it_is_expanded(first, second, x):
    first(x)[0].sum().backward()
    first(x)[0].sum(1).square().sum().backward()
    first(x)[1].sum().backward()
    return []


def _it_has_strides_of_its_own(first, second, x):
    y, _ = first(x)
    m, n, K = y.shape
    mask = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(n, m, K).transpose(0, 1)
    loss = torch.where(mask > -0.5, y, 0.0).sum()
    del y
    loss.backward()
    torch.nn.functional.pad(first(x)[1], (1, 1)).sin().sum().backward()
    return []


def _its_rows_overlap(first, second, x):
    y = first(x)[0].flatten(0, 1)
    rows, width = y.shape
    step = width * 2 // 3
    sizes = [(rows - 1) * step + width]
    added = torch.ops.aten.unfold_backward(y, sizes, 0, width, step).sin().sum()
    with torch.inference_mode():  # whose views keep no base
        added.backward()
    return []


def _a_frozen_direction_changes(first, second, x):
    frozen = [p for name, p in first.named_parameters() if name.endswith("reverse")]
    for p in frozen:
        p.requires_grad_(False)
    loss = first(x.detach())[0].sin().sum()
    for p in frozen:
        p.zero_()
    loss.backward()
    return []


def _the_node_is_called_by_another_backward(first, second, x):
    y, _ = first(x)
    seen = []

    def call(grad):
        others = [None] * (len(z.grad_fn._input_metadata) - 1)  # of h_n, if it has the same node
        for _ in range(2):
            seen.extend(g for g in (z.grad_fn(torch.ones_like(z), *others),) if g is not None)

    z, _ = second(y.detach())
    y.register_hook(call)
    y.sin().sum().backward()
    assert len(seen) == 2
    z.sin().sum().backward()
    return []


def _hooks_keep_what_is_saved(first, second, x):
    kept = []

    def pack(tensor):
        kept.append((tensor, tensor.clone()))
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: kept[i][0]):
        loss = second(first(x)[0])[0].square().sum()
    loss.backward()
    return [sum((tensor - before).abs().sum() for tensor, before in kept)]


def _it_is_computed_again(first, second, x):
    def both(x):
        return second(first(x)[0])[0]

    checkpoint(both, x, use_reentrant=False).square().sum().backward()
    checkpoint(both, x, use_reentrant=True).square().sum().backward()
    return []


SEEN = {
    "the caller has it": _the_caller_has_it,
    "it is retained": _it_is_retained,
    "a hook keeps it": _a_hook_keeps(lambda grad: grad),
    "a hook keeps a view": _a_hook_keeps(lambda grad: grad.detach()[1:]),
    "a hook keeps an array": _a_hook_keeps(lambda grad: grad.numpy()),
    "a hook of the node keeps it": _a_hook_of_the_node_keeps_it,
    "the output is kept": _the_output_is_kept(lambda y: y),
    "its data are kept": _the_output_is_kept(lambda y: y.detach()),
    "a part is kept": _the_output_is_kept(lambda y: y.detach()[-1]),
    "an array is kept": _the_output_is_kept(lambda y: y.detach().numpy()),
    "the output is saved elsewhere": _the_output_is_saved_elsewhere,
    "a leaf gets it, too": _a_leaf_gets_it_too,
    "the graph is kept": _the_graph_is_kept,
    "it is asked for": _it_is_asked_for,
    "it is differentiated": _it_is_differentiated,
    "it is an array": _it_is_an_array,
    "it is expanded": _it_is_expanded,
    "it has strides of its own": _it_has_strides_of_its_own,
    "its rows overlap": _its_rows_overlap,
    "a frozen direction changes": _a_frozen_direction_changes,
    "the node is called by another backward": _the_node_is_called_by_another_backward,
    "hooks keep what is saved": _hooks_keep_what_is_saved,
    "it is computed again": _it_is_computed_again,
}


SIZES = {"one step": (1, 4, 3, 6), "one sequence": (2, 1, 3, 100)}


@pytest.mark.parametrize("size", ["few steps", *SIZES])
@pytest.mark.parametrize("kind", ["one direction", "batch first", "bidirectional"])
@pytest.mark.parametrize("case", SEEN)
def test_a_backward_uses_up_nothing_that_others_see(backend, case, kind, size):
    """Gradients become dz in place, and outputs are let go of, where nothing else has them."""
    options = {"bidirectional": kind == "bidirectional", "batch_first": kind == "batch first"}
    (T, B, I, H), K = SIZES.get(size, (9, 4, 3, 6)), 5
    modules = zip(
        pair(I, H, dtype=torch.float64, **options),
        pair(H * (1 + options["bidirectional"]), K, dtype=torch.float64, seed=1, **options),
        strict=True,
    )
    x = torch.randn((B, T, I) if kind == "batch first" else (T, B, I), dtype=torch.float64)
    results = []
    for first, second in modules:
        own = x.clone().requires_grad_()
        seen = SEEN[case](first, second, own)
        parameters = (*first.parameters(), *second.parameters(), own)
        results.append([torch.as_tensor(y).detach() for y in seen] + [p.grad for p in parameters])
    for actual, expected in zip(*results[::-1], strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert_same(actual, expected, 2 * T, I + H + K + T * B)


def test_states_of_cells_that_others_see_stay(backend):
    results = []
    for cell in cells():
        h = start = torch.zeros(2, 5, requires_grad=True)
        seen = []
        for _ in range(6):
            h = cell(torch.ones(2, 3), h)
            h.register_hook(seen.append)
            seen.append(h)
        h.square().sum().backward()
        results.append([*seen, start.grad, *(p.grad for p in cell.parameters())])
    for actual, expected in zip(*results[::-1], strict=True):
        assert_same(actual, expected, 6, 8)
