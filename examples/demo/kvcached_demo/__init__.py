"""`kvcached demo`: two real engines share one pool, and you watch.

`harness` starts, asks and watches engines; the demo, the tests and the benchmarks use it alike.
"""
