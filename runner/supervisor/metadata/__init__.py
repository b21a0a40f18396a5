"""What a cloud says about this machine's near future, asked at its metadata service.

    source   said by                                   how long before          the run
    aws      spot/instance-action: terminate, stop     2 min, `time` says it    saves, commits, ends with 75
    aws      spot/instance-action: hibernate           none: it begins at once  the same, as far as it gets
    aws      events/recommendations/rebalance          minutes, or together     saves, and goes on
    gce      instance/preempted: TRUE                  30 s, 120 s if the       saves, commits, ends with 75
                                                       machine was made so
    gce      instance/maintenance-event:               60 min with a GPU        saves, and goes on
             TERMINATE_ON_HOST_MAINTENANCE
    gce      MIGRATE_ON_HOST_MAINTENANCE               60 s                     goes on: so does the machine
    azure    scheduledevents: Preempt                  30 s, `NotBefore`        saves, commits, ends with 75
    azure    Terminate                                 5 to 15 min              the same
    azure    Reboot, Redeploy                          10 to 15 min             saves, and goes on
    azure    Freeze                                    15 min                   goes on: a pause of seconds

What only saves and goes on is too early to stop for, or may never come; what follows it is a signal or one of
the other rows. Azure names the machines that an event is for, and tells it to their neighbours as well: only
events for this one count. Nothing is asked on a laptop, and in a pod, where the node speaks through SIGTERM
(`choose`). A service that is slow, absent or wrong is asked less and less often, and said once (`watch`).

Sources: AWS, "Spot Instance interruption notices", "EC2 instance rebalance recommendations"; Google, "Spot
VMs", "Monitor and plan for a host maintenance event"; Microsoft, "Azure Metadata Service: Scheduled Events
for Linux VMs", version 2020-07-01.
"""
