"""Jobs in somebody else's cluster: submit, follow, read and end them.

verbs, act                     `runner submit | logs | cancel`, and `describe` for `runner status`
kubectl, refusals              the seam to Kubernetes, and what its refusals mean
jobs, waiting, kubernetes      submissions there: to find and make, why one waits, to look at
batch, batch_jobs, aws_batch   the seam to AWS Batch, and submissions there: to make, to look at
following                      either, to its end
signals                        Ctrl-C waits until a submission is whole or undone

What is sent is what `runner render` prints (`runner.targets`), under a name of its own.
"""
