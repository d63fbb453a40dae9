"""Measurements of the five ops against their limits and their peers: `python -m bench`, or `pytest bench/`.

    harness    what is measured: problems, variants, cases of a record
    timing     how a call is timed        environment where and with what a record was made
    memory     peak extra memory          problems   tensors, losses and the float64 truth of the language-model head
    peers      other packages' heads      bench_X    one file per op: its problems and variants
    report     tables and targets         gpu_suite  everything a GPU run needs, in one command

Run from the repository root; not part of the wheel.
"""
