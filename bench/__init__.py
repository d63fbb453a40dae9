"""Measurements of the five ops against their limits and their peers: `python -m bench`, or `pytest bench/`.

    harness    what a measurement is: problems, variants, interleaved timing, records
    memory     peak extra memory          problems   tensors, losses and the float64 truth of the language-model head
    peers      other packages' heads      bench_X    one file per op: its problems and variants
    report     tables and targets         gpu_suite  everything a GPU run needs, in one command

Run from the repository root; not part of the wheel.
"""
