"""`runner export`: what a run has trained, as a folder that needs nothing of this runner.

    find the run -> fetch its base -> is there room? -> write, in a process of its own (`runner.train.export`)
    -> card and job -> load it with plain transformers, in a fresh process -> one rename -> the hub, if asked

    verb      the command line                       order     what crosses to `runner.train.export`, and back
    source    a job, a folder or an address -> a run likeness  when two models give the same answers. Pure
    build     the sequence above                     card      the model card; code: how it is loaded. Pure
    public    a job without this machine. Pure       hub       huggingface_hub's upload, its failures as ours

Nothing is trained or judged here, and nothing appears at its place before it was loaded from there.
"""
