"""rnnfast's measuring instrument: ``pytest benchmarks/``, then ``python -m benchmarks.report``.

=================  =================================================================================
cases.py           what is measured: shapes, kinds of work, their FLOPs and inputs
contenders.py      who is measured: nn.RNN, rnnfast on each backend, JAX, ONNX Runtime, ...
measure.py         how: pinned threads, interleaved blocks, errors, memory, the machine's limits
test_rnn.py        the benchmarks
test_harness.py    checks of the instrument itself, run before them
bars.py            what the product must reach, as data
report.py          saved results -> tables, README, bars; plots.py draws them
random_calls.py    ``python -m benchmarks.random_calls``: is a call drawn at random ever slower?
=================  =================================================================================
"""
