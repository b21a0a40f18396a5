"""The parts of the supervisor, without torch; `runner.launch` puts them together.

run_folder     the paths of a run, and its lock
identity       what makes a run this run; a job that differs is refused
fetch, hub     a child process gets models and datasets; fetching is the parent's side of it
attempt        one trainer: its folder, its environment, the watch over it, how it ended in words
seen           what its events say about where it is
watchdog       when a trainer hangs
cgroup         how full the memory is, and whom the kernel killed for it
remains        what a child leaves behind: its last error, its outcome
ranks, shim    a child process: started so that it cannot outlive us, watched until it is gone
verdict        what follows when it ends: once more, done, or stop
evaluation     `runner evaluate`
progress       what people see
result         result.json
"""
