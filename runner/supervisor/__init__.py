"""The parts of the supervisor, without torch; `runner.launch` puts them together.

run_folder     the paths of a run, and its lock
identity       what makes a run this run; a job that differs is refused
fetch, hub     a child process gets models and datasets; fetching is the parent's side of it
attempt        one trainer: its folder, its environment, what it said, how it ended in words
ranks          a child process: started so that it cannot outlive us, watched until it is gone
verdict        what follows when it ends: once more, done, or stop
evaluation     `runner evaluate`
progress       what people see
result         result.json
"""
