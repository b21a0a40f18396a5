"""How a job is read and judged, without torch: everything behind `runner.settings.resolve`.

file, yaml_source, layers     text -> trees with positions, one for each source
shape, check                  a tree against the generated schema: every problem at once
ownership, foreign, matrix    whose key it is; other tools' names; what does not go together
secrets                       what must not stand in a job
resolved                      the job back as YAML, with the source of every value
"""
