-- Every statement of the engine that is not a migration.
-- `-- name --` opens a statement, the comment below says what it is for; parameters are named, as psycopg has them.

-- insert_definition --
-- Record a definition; no row where its id and version are there already.
INSERT INTO pipeline.workflow_definitions (workflow_id, version, digest, definition)
VALUES (%(workflow_id)s, %(version)s, %(digest)s, %(definition)s)
ON CONFLICT (workflow_id, version) DO NOTHING RETURNING definition_id

-- insert_plan --
-- Record what a definition compiles to.
WITH plan AS (
    INSERT INTO pipeline.workflow_tasks
        (definition_id, task_id, number, handler, timeout, dependencies, waits_for, releases, headers, params,
         retry_policy, slots)
    SELECT %(definition_id)s, t.task_id, t.number, t.handler, t.timeout, coalesce(t.dependencies, '{}'),
           coalesce(t.waits_for, t.dependencies, '{}'), coalesce(t.releases, '{}'), coalesce(t.headers, '{}'), t.params,
           t.retry_policy, t.slots
      FROM json_to_recordset(%(tasks)s) AS t (
        task_id text, number int, handler text, timeout double precision,
        dependencies text[], waits_for text[], releases text[], headers int[], params json, retry_policy json,
        slots int[]))
INSERT INTO pipeline.workflow_headers (definition_id, number, tasks, bodies, slots)
SELECT %(definition_id)s, h.* FROM json_to_recordset(%(headers)s) AS h (number int, tasks text[], bodies text[], slots int[])

-- definition_digest --
-- What is registered under an id and version.
SELECT definition_id, digest FROM pipeline.workflow_definitions
 WHERE workflow_id = %(workflow_id)s AND version = %(version)s

-- find_definition --
-- A registered definition; the newest where no version is asked for.
SELECT definition_id, definition::text AS definition FROM pipeline.workflow_definitions
 WHERE workflow_id = %(workflow_id)s AND (%(version)s::text IS NULL OR version = %(version)s)
 ORDER BY definition_id DESC LIMIT 1

-- definition_of --
-- The definition of an execution.
SELECT d.definition_id, d.definition::text AS definition
  FROM pipeline.workflow_executions e JOIN pipeline.workflow_definitions d USING (definition_id)
 WHERE e.execution_id = %(execution_id)s

-- create_executions --
-- Record executions of one definition, their states, all their tasks and counters; no row for one whose id is another's.
SELECT c.number, c.created, c.execution_id, c.same_work, to_json(c.ready) AS ready FROM pipeline.create_executions(
    %(definition_id)s, %(user_id)s, %(work)s, %(variables)s, %(timeout)s, %(queue_timeout)s, %(grace)s, %(leader)s) c

-- claim_task --
-- Take a task for this worker's incarnation; no row where the message was stale. `with_state` brings what never changes.
SELECT c.*, CASE WHEN %(with_state)s THEN pipeline.state_of(c.execution_id) END AS state
  FROM pipeline.claim_task(
    %(execution_id)s, %(task_id)s, %(epoch)s, %(worker_id)s, %(hard_limit)s, %(handler)s) c

-- leads_of --
-- Executions whose first tasks share the message of a task that no worker was given.
SELECT unnest(leads) AS execution_id FROM pipeline.task_executions
 WHERE execution_id = %(execution_id)s AND task_id = %(task_id)s AND attempt = 0

-- execution_state --
-- What every task of an execution may read.
SELECT e.workflow_id, e.created_by, s.variables, s.input_data
  FROM pipeline.workflow_executions e JOIN pipeline.workflow_states s USING (execution_id)
 WHERE e.execution_id = %(execution_id)s

-- results_of --
-- Results of named tasks.
SELECT task_id, result FROM pipeline.task_executions
 WHERE execution_id = %(execution_id)s AND task_id = ANY (%(task_ids)s)

-- complete_task --
-- Record a success along the straight path, and claim what this worker goes on with; with the state of its execution where asked.
SELECT c.outcome, to_json(c.ready) AS ready, CASE WHEN (c.next).task_id IS NOT NULL THEN to_json(c.next) END AS next, c.state,
       c.kept, c.durable, c.closing
  FROM pipeline.complete_task(
    %(execution_id)s, %(task_id)s, %(epoch)s, %(worker_id)s, %(result)s, %(grace)s,
    %(room)s, %(next_execution)s, %(next_task)s, %(next_epoch)s, %(handler)s, %(hard_limit)s, %(durable)s,
    %(with_state)s, %(closing)s) c

-- close_executions --
-- End executions of which every task has succeeded.
SELECT pipeline.close_executions(%(execution_ids)s) AS count

-- close_overdue --
-- End those that whoever ran their last tasks should have ended by now.
SELECT pipeline.close_executions(
    ARRAY(SELECT execution_id FROM pipeline.closings WHERE due_at <= pipeline.clock() LIMIT %(limit)s)) AS count

-- scatter --
-- A message of its own for each of these tasks.
SELECT * FROM pipeline.scatter(%(execution_id)s, %(task_ids)s, %(epochs)s, %(grace)s)

-- end_task --
-- Record any end of an attempt along the careful path.
SELECT c.outcome, to_json(c.ready) AS ready FROM pipeline.end_task(
    %(execution_id)s, %(task_id)s, %(epoch)s, %(worker_id)s, %(outcome)s, %(result)s,
    %(error_type)s, %(error_message)s, %(error_traceback)s, %(delay)s, %(loss_budget)s, %(grace)s) c

-- running_in --
-- The fences of what a process runs, for whoever learns that it is gone.
SELECT t.execution_id, t.task_id, t.epoch, t.worker_id, t.retries, w.retry_policy
  FROM pipeline.task_executions t JOIN pipeline.workers k USING (worker_id)
  JOIN pipeline.workflow_executions e USING (execution_id)
  JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = t.task_id
 WHERE t.status = 'running' AND t.deadline_at IS NOT NULL AND k.name = %(worker)s AND k.pid = %(pid)s

-- set_progress --
-- Show how far an attempt is; nothing where the fence does not hold.
UPDATE pipeline.task_executions SET progress = %(percent)s, progress_message = %(message)s
 WHERE execution_id = %(execution_id)s AND task_id = %(task_id)s
   AND status = 'running' AND epoch = %(epoch)s AND worker_id = %(worker_id)s

-- start_worker --
-- A new incarnation.
INSERT INTO pipeline.workers (name, pid, handlers, expires_at)
VALUES (%(worker_name)s, %(pid)s, %(handlers)s, pipeline.clock() + %(lease)s)
RETURNING worker_id

-- renew_worker --
-- Renew the lease, also one that ran out: what the incarnation ran is either still its own or was taken by a fence.
UPDATE pipeline.workers
   SET heartbeat_at = pipeline.clock(), expires_at = pipeline.clock() + %(lease)s, slow = coalesce(%(slow)s, slow),
       quick = coalesce(%(quick)s, quick)
 WHERE worker_id = %(worker_id)s RETURNING worker_id

-- renew_workers --
-- Renew the leases of a worker's processes that run; what ran out or was given back stays so.
UPDATE pipeline.workers SET heartbeat_at = pipeline.clock(), expires_at = pipeline.clock() + %(lease)s
 WHERE name = %(worker_name)s AND pid = ANY (%(pids)s) AND expires_at > pipeline.clock() RETURNING worker_id

-- end_worker --
-- Give the lease back.
UPDATE pipeline.workers SET expires_at = pipeline.clock() WHERE worker_id = %(worker_id)s RETURNING worker_id

-- live_workers --
-- How many incarnations after a given one have a lease that runs.
SELECT count(*)::int AS count FROM pipeline.workers
 WHERE expires_at > pipeline.clock() AND worker_id > %(after)s

-- newest_worker --
-- The last incarnation that was made.
SELECT coalesce(max(worker_id), 0)::int AS count FROM pipeline.workers

-- running_on --
-- What an incarnation is said to run, and whether it should stop: never before the verdict, which names the reason.
SELECT t.execution_id, t.task_id, t.epoch, t.worker_id, t.retries, t.started_at < pipeline.clock() - %(age)s AS settled,
       e.verdict IS NOT NULL AND (e.verdict = 'cancelled' OR e.deadline_at <= pipeline.clock()) IS TRUE AS stop
  FROM pipeline.task_executions t JOIN pipeline.workflow_executions e USING (execution_id)
 WHERE t.worker_id = %(worker_id)s AND t.status = 'running' AND t.deadline_at IS NOT NULL

-- recovery_work --
-- What needs recovery, in one look at the partial indexes: kind and how many.
SELECT EXISTS (SELECT 1 FROM pipeline.task_executions
                WHERE status IN ('pending', 'retry') AND due_at <= pipeline.clock()) AS due,
       EXISTS (SELECT 1 FROM pipeline.task_executions t JOIN pipeline.workers k USING (worker_id)
                WHERE t.status = 'running' AND t.deadline_at IS NOT NULL AND k.expires_at <= pipeline.clock()) AS lost,
       EXISTS (SELECT 1 FROM pipeline.task_executions
                WHERE status = 'running' AND deadline_at <= pipeline.clock()) AS overdue,
       EXISTS (SELECT 1 FROM pipeline.workflow_executions
                WHERE deadline_at <= pipeline.clock() AND finished_at IS NULL AND verdict IS NULL)
       OR EXISTS (SELECT 1 FROM pipeline.workflow_executions e
                   WHERE e.queue_timeout IS NOT NULL AND e.finished_at IS NULL AND e.verdict IS NULL AND NOT e.paused
                     AND EXISTS (SELECT 1 FROM pipeline.task_executions t
                                  WHERE t.execution_id = e.execution_id AND t.status = 'pending'
                                    AND t.due_at IS NOT NULL AND t.ready_at <= pipeline.clock() - e.queue_timeout))
       AS expired,
       EXISTS (SELECT 1 FROM pipeline.closings WHERE due_at <= pipeline.clock()) AS closing

-- lost_attempts --
-- Running tasks whose worker's lease ran out.
SELECT t.execution_id, t.task_id, t.epoch, t.worker_id, t.retries
  FROM pipeline.task_executions t JOIN pipeline.workers k USING (worker_id)
 WHERE t.status = 'running' AND t.deadline_at IS NOT NULL AND k.expires_at <= pipeline.clock()
 ORDER BY t.execution_id, t.task_id LIMIT %(limit)s

-- overdue_attempts --
-- Running tasks that even the hard limit did not end.
SELECT execution_id, task_id, epoch, worker_id, retries FROM pipeline.task_executions
 WHERE status = 'running' AND deadline_at <= pipeline.clock()
 ORDER BY execution_id, task_id LIMIT %(limit)s

-- expired_executions --
-- Open executions whose time is up, or whose tasks waited too long for a worker.
SELECT execution_id FROM pipeline.workflow_executions
 WHERE deadline_at <= pipeline.clock() AND finished_at IS NULL AND verdict IS NULL
UNION
SELECT e.execution_id FROM pipeline.workflow_executions e
 WHERE e.queue_timeout IS NOT NULL AND e.finished_at IS NULL AND e.verdict IS NULL AND NOT e.paused
   AND EXISTS (SELECT 1 FROM pipeline.task_executions t
                WHERE t.execution_id = e.execution_id AND t.status = 'pending' AND t.due_at IS NOT NULL
                  AND t.ready_at <= pipeline.clock() - e.queue_timeout)
 ORDER BY execution_id LIMIT %(limit)s

-- expire_execution --
-- End an execution whose time is up.
SELECT pipeline.expire_execution(%(execution_id)s) AS expired

-- count_published --
-- How many messages the broker should hold: those of tasks that were published and not claimed, or lead others.
SELECT count(*)::int AS count FROM pipeline.task_executions
 WHERE status IN ('pending', 'retry') AND due_at IS NOT NULL AND hints > 0 AND led_by IS NULL

-- take_due --
-- Tasks whose message is to be published (again); with `first_only`, only those that never were.
SELECT * FROM pipeline.take_due(%(limit)s, %(first_only)s, %(grace)s)

-- cancel_execution --
-- Stop an execution: the status that it was found in, NULL where there is none.
SELECT pipeline.cancel_execution(%(execution_id)s, %(user_id)s) AS status

-- pause_execution --
-- Let nothing new start.
SELECT pipeline.pause_execution(%(execution_id)s, %(user_id)s) AS status

-- resume_execution --
-- Let things start again.
SELECT pipeline.resume_execution(%(execution_id)s, %(user_id)s) AS status

-- reopen_execution --
-- Open an ended execution again, from a named task or from what did not succeed.
SELECT pipeline.reopen_execution(%(execution_id)s, %(user_id)s, %(task_id)s, %(params)s) AS status

-- mark_task --
-- Decide a task by hand.
SELECT c.status AS outcome, c.changed, to_json(c.ready) AS ready FROM pipeline.mark_task(
    %(execution_id)s, %(task_id)s, %(status)s, %(result)s, %(user_id)s, %(reason)s, %(grace)s) c

-- get_events --
-- What people did to an execution, in order.
SELECT kind, task_id, user_id, at, detail FROM pipeline.workflow_events
 WHERE execution_id = %(execution_id)s ORDER BY event_id

-- finished_before --
-- Executions that ended long enough ago, oldest first.
SELECT execution_id FROM pipeline.workflow_executions
 WHERE finished_at < pipeline.clock() - %(age)s ORDER BY finished_at LIMIT %(limit)s

-- close_for_good --
-- Let nobody open an ended execution again.
SELECT pipeline.close_for_good(%(execution_id)s) AS closed

-- forget_executions --
-- Delete ended executions with all their rows.
SELECT pipeline.forget_executions(%(execution_ids)s) AS count

-- make_partitions --
-- Partitions for the executions of the coming days.
SELECT pipeline.make_partitions(%(days)s, %(most_bytes)s) AS count

-- drop_partitions --
-- Drop the partitions that hold nothing but what was forgotten.
SELECT pipeline.drop_partitions() AS count

-- forget_workers --
-- Delete incarnations that ended long ago and that nothing names.
DELETE FROM pipeline.workers k WHERE k.expires_at < pipeline.clock() - %(age)s
   AND NOT EXISTS (SELECT 1 FROM pipeline.task_executions t
                    WHERE t.worker_id = k.worker_id AND t.status = 'running' AND t.deadline_at IS NOT NULL)

-- await_execution --
-- Have its end told to those who listen; no row where that is so already, or it has ended.
UPDATE pipeline.workflow_executions SET awaited = true
 WHERE execution_id = %(execution_id)s AND NOT awaited AND finished_at IS NULL RETURNING status

-- get_execution --
-- One execution.
SELECT e.execution_id, e.workflow_id, d.version, d.digest, e.status, e.verdict, e.paused, e.run, e.created_by,
       e.idempotency_key, e.error_message, e.created_at, e.started_at, e.finished_at, s.input_data, s.variables
  FROM pipeline.workflow_executions e
  JOIN pipeline.workflow_definitions d USING (definition_id)
  JOIN pipeline.workflow_states s USING (execution_id)
 WHERE e.execution_id = %(execution_id)s

-- get_tasks --
-- Its tasks, in topological order.
SELECT t.task_id, t.handler, t.status, t.epoch, t.attempt, t.retries, t.losses, t.ready_at, t.started_at,
       t.finished_at, t.progress, t.progress_message, t.result, t.error_type, t.error_message, t.error_traceback,
       CASE WHEN t.status = 'retry' THEN nullif(t.due_at, 'infinity') END AS retry_at, k.name AS worker,
       t.status IN ('pending', 'retry') AND t.due_at IS NOT NULL AND NOT EXISTS (
           SELECT 1 FROM pipeline.workers l
            WHERE l.expires_at > pipeline.clock() AND l.handlers @> ARRAY[t.handler]) AS unserved
  FROM pipeline.task_executions t
  JOIN pipeline.workflow_executions e USING (execution_id)
  JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = t.task_id
  LEFT JOIN pipeline.workers k USING (worker_id)
 WHERE t.execution_id = %(execution_id)s ORDER BY w.number

-- get_attempts --
-- The attempts of a task that were followed by another, in order.
SELECT a.attempt, a.epoch, a.outcome, a.started_at, a.ended_at, a.error_type, a.error_message, a.error_traceback,
       k.name AS worker
  FROM pipeline.workflow_executions e JOIN pipeline.task_attempts a USING (execution_id)
  LEFT JOIN pipeline.workers k USING (worker_id)
 WHERE a.execution_id = %(execution_id)s AND a.task_id = %(task_id)s ORDER BY a.epoch

-- get_task --
-- One task's state, for Celery's AsyncResult.
SELECT t.status, t.result, t.error_type, t.error_message, t.error_traceback, t.finished_at,
       e.finished_at IS NOT NULL AS execution_ended
  FROM pipeline.workflow_executions e JOIN pipeline.task_executions t USING (execution_id)
 WHERE t.execution_id = %(execution_id)s AND t.task_id = %(task_id)s

-- settle_task --
-- Wait until what was committed of a task is on disk: the lock is written to the WAL behind it, and its own commit waits.
SELECT status FROM pipeline.task_executions
 WHERE execution_id = %(execution_id)s AND task_id = %(task_id)s FOR KEY SHARE

-- execution_status --
-- Only the status, for waiters.
SELECT status FROM pipeline.workflow_executions WHERE execution_id = %(execution_id)s

-- list_executions --
-- The newest executions, with how many of their tasks ended.
SELECT e.execution_id, e.workflow_id, d.version, e.status, e.paused, e.created_by, e.error_message, e.created_at,
       e.started_at, e.finished_at, count(t.*) AS tasks, count(t.finished_at) AS ended
  FROM (SELECT * FROM pipeline.workflow_executions
         WHERE %(status)s::text IS NULL OR status = %(status)s
         ORDER BY created_at DESC LIMIT %(limit)s) e
  JOIN pipeline.workflow_definitions d USING (definition_id)
  LEFT JOIN pipeline.task_executions t USING (execution_id)
 GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 ORDER BY e.created_at DESC

-- audit --
-- Every violated invariant.
SELECT * FROM pipeline.audit()
