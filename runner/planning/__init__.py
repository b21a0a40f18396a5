"""`runner plan JOB`: what a run will be, and the checks that its first minute on a GPU would fail.

    resolve -> fetch all but the weights -> ask torch, in a process of its own (`runner.train.inspect`)
    -> count -> try the store -> one document -> words for people, or JSON (docs/plan.md)

    verb        the order of things
    numbers     steps, checkpoints, grace, time and price: arithmetic, pure
    store       whether the run's place keeps its conditions and lets us write
    memory      bytes on a device, what fits, and the levers
    words       the document as lines

No GPU, no weights, no torch in this process; nothing is left behind but what was fetched.
"""
