"""The parts of the supervisor, without torch; `runner.launch` puts them together.

run_folder     the paths of a run on this machine, and its lock
identity       what makes a run this run; a job that differs is refused
custody        the run in its store: opened, taken, restored, shipped, given back
fetch, hub     a child process gets models and datasets; fetching is the parent's side of it
attempts       one trainer after another, each from the newest checkpoint
attempt        one trainer: its folder, its ranks, how it ended in words
seen, remains  what it said while it ran, and what it left
world          how many processes this machine gives a job, and how they share the model
choice, ask    the strategy that `auto` takes, and what only torch knows of a job
environment    what they find in their environment
notices        what asks a run to stop
ranks, shim    child processes: started so that they cannot outlive us, watched until they are gone
watchdog       when a trainer hangs; cgroup: how near it is to the memory limit
pace, direct   how often it saves, and what it is asked for: go, wait, stop
batch          the per-device size of a run's attempts
verdict        what follows when a trainer ends: once more, done, or stop
final          what a run ends with, as one folder
evaluation     `runner evaluate`
link, uplink   node 0 and the nodes that follow it; wire: what they say, hello: who may
team           the other nodes, as the attempts of node 0 see them
follow, order  what a node does that follows node 0, and what it is asked for; member: its command
journal        what happens, told once: to the events, the record, the screen
progress       a run in words; opening: what it begins with
screen         what people see; display: and what programs see
result         result.json, and the record that `HEAD` keeps
"""
