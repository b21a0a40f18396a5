"""`training.report_to`: what a run has done, told to trackers, each step once over all attempts and machines.

    choice.py       which trackers a job asks for, and whether their packages are here
    request.py      what the process of one tracker is told, and what it finds in its environment
    feed.py         what is committed by now: rows of numbers, from the files of the run's folder
    rows.py         how these numbers are called
    to_*.py         one tracker each: open the run, read back what is there, add rows, end it
    __main__.py     `python -m runner.tracking REQUEST`, one process a tracker
    prometheus.py   the text of `metrics.prom`; the supervisor writes it

A tracker is a process of its own, which the supervisor starts and may lose at any moment
(`runner.supervisor.trackers`): nothing that happens there reaches the run. The trainer talks to no tracker.

A step is logged when a checkpoint that holds it is committed, so no step that is logged is ever done again.
What was logged already is read back through the tracker's own reader, and nothing else is believed: a
process that is killed between a log and its note would log twice.
"""
