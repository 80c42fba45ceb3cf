"""Side by side on one machine: this engine, stock Celery and its peers, on graphs of no-ops. `python -m benchmarks --help`.

shapes       what is run: graphs, and what is done with them
contenders/  who runs it: one module each, in a process (and, for peers, an environment) of its own
driver       the child's side of that process; remote is the parent's
field        the contenders by name, and what they need installed
services     Postgres and Redis for the whole run, with a fresh database for each start of a contender
race         repetitions with alternating contenders, and what was measured
targets      what is wanted, against what was reached
table        the results as text; chart draws them
costs        what a task costs each kind of process; simulation works out from it, with fleet, what others would do
joins        many connections that end tasks of one join; partitions: what a partition costs
"""
