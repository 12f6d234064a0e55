"""Does it learn? One base, one data path, one trainer and one budget of tuning for every method.

    python -m benchmarks.accuracy.study --base report/base --data ../shared/data

`tasks` reads and splits the data, `scoring` is the likelihood of answers, `methods` names the adapters, `training` is
one run, `study` the queue of runs, `rows` their file, a JSON line a run, and `tables` what is made of the rows.
`harness_task` writes a test split for lm-evaluation-harness.
"""
