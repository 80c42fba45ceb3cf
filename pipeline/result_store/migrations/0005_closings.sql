-- Executions whose last tasks one worker ran in a row end together. To record them, to claim and to complete takes fewer
-- statements, and to record them no planning.

CREATE TABLE pipeline.closings (
    execution_id  text COLLATE "C" PRIMARY KEY,
    due_at        timestamptz NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX closings_due ON pipeline.closings (due_at);

DROP FUNCTION pipeline.create_execution(
    text, bigint, text, text, jsonb, text, jsonb, interval, interval, interval, pipeline.ready_task);
DROP FUNCTION pipeline.complete_task(
    text, text, int, bigint, jsonb, interval, double precision, text, text, int, text, interval, boolean, boolean);
DROP FUNCTION pipeline.create_executions(bigint, text, jsonb, jsonb, interval, interval, interval);
-- In another order now: a worker of the version before, which would not understand the answer, claims nothing.
DROP FUNCTION pipeline.claim_task(text, text, int, bigint, text, interval);

ALTER TABLE pipeline.task_executions ADD COLUMN leads text[];
ALTER TYPE pipeline.claimed_task ADD ATTRIBUTE leads text[];

CREATE OR REPLACE FUNCTION pipeline.clock() RETURNS timestamptz LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN coalesce(nullif(current_setting('pipeline.fake_now', true), '')::timestamptz, clock_timestamp());
END $$;

CREATE FUNCTION pipeline.may_be_joined(p_handler text, p_grace interval) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
DECLARE
    known record;
BEGIN
    SELECT f.* INTO known FROM pipeline.fleet() f;
    RETURN p_handler = ANY (known.quick) AND p_handler <> ALL (known.slow) AND known.processes * 2 <= (
        SELECT count(*) FROM (
            SELECT 1 FROM pipeline.task_executions w
             WHERE w.status IN ('pending', 'retry') AND w.due_at > pipeline.clock() + p_grace - interval '1 s'
               AND w.led_by IS NULL AND w.hints > 0 LIMIT known.processes * 2) waiting);
END $$;

CREATE FUNCTION pipeline.join_message(p_leader text, p_definition bigint, p_task text, p_execution text) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(pipeline.lock_key(p_leader)) THEN
        RETURN false;
    END IF;
    UPDATE pipeline.task_executions t SET leads = t.leads || p_execution
      FROM pipeline.workflow_executions e
     WHERE t.execution_id = p_leader AND t.task_id = p_task AND t.status = 'pending' AND t.attempt = 0 AND t.hints = 1
       AND coalesce(t.due_at, 'infinity') < 'infinity'  -- by the key, and not by the index of what is due
       AND t.ready_at > pipeline.clock() - interval '1 s' AND cardinality(t.leads) < 7
       AND e.execution_id = p_leader AND e.definition_id = p_definition AND NOT e.paused AND e.verdict IS NULL;
    RETURN FOUND;
END $$;

CREATE FUNCTION pipeline.create_executions(
    p_definition bigint, p_user text, p_work jsonb, p_variables jsonb, p_deadline interval, p_queue_timeout interval,
    p_grace interval, p_leader text
) RETURNS TABLE (number int, created boolean, execution_id text, same_work boolean, ready pipeline.ready_task[])
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    now_ timestamptz := pipeline.clock();  -- asked for each task, it would take as long as a sixth of the whole
    workflow text;
    entry text[];
    each_ int;
    given record;
    made text[] := '{}';
    numbers int[] := '{}';
    leaders text[] := '{}';
    leads_ text[];
BEGIN
    SELECT d.workflow_id INTO STRICT workflow FROM pipeline.workflow_definitions d WHERE d.definition_id = p_definition;
    entry := ARRAY(SELECT t.task_id FROM pipeline.workflow_tasks t
                    WHERE t.definition_id = p_definition AND t.waits_for = '{}');
    IF jsonb_array_length(p_work) > 1 AND cardinality(entry) = 1 AND p_grace > '0' THEN
        SELECT least(greatest(ceil(jsonb_array_length(p_work)::float8 / greatest(f.processes, 1))::int,
                              CASE WHEN t.handler = ANY (f.quick) THEN 4 END),
                     1 + greatest(0, floor((330 - 3.5 * octet_length(t.task_id) - octet_length(t.handler)) * 0.74
                               / (octet_length(p_work -> 0 ->> 'execution_id') + octet_length(t.task_id) + 12)))::int) INTO each_
          FROM pipeline.fleet() f
          JOIN pipeline.workflow_tasks t ON t.definition_id = p_definition AND t.task_id = entry[1] AND t.handler <> ALL (f.slow);
    END IF;
    FOR given IN SELECT w.* FROM ROWS FROM (jsonb_to_recordset(p_work) AS (
            execution_id text, idempotency_key text, input_data jsonb, input_digest text)) WITH ORDINALITY w LOOP
        INSERT INTO pipeline.workflow_executions AS e
            (execution_id, definition_id, workflow_id, created_by, idempotency_key, input_digest, created_at, deadline_at,
             queue_timeout)
            VALUES (given.execution_id, p_definition, workflow, p_user, given.idempotency_key, given.input_digest, now_,
                    now_ + p_deadline, p_queue_timeout)
            ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            RETURN QUERY SELECT given.ordinality::int, false, e.execution_id,
                                e.definition_id = p_definition AND e.input_digest = given.input_digest, NULL::pipeline.ready_task[]
                FROM pipeline.workflow_executions e WHERE e.workflow_id = workflow AND e.idempotency_key = given.idempotency_key;
            CONTINUE;
        END IF;
        INSERT INTO pipeline.workflow_states VALUES (given.execution_id, p_variables, given.input_data) ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN  -- of an execution that is forgotten, whose partition is still there
            DELETE FROM pipeline.workflow_executions e WHERE e.execution_id = given.execution_id;
            CONTINUE;
        END IF;
        leaders := leaders || CASE WHEN cardinality(made) % coalesce(each_, 1) = 0 THEN given.execution_id
                                   ELSE leaders[cardinality(made)] END;
        made := made || given.execution_id;
        numbers := numbers || given.ordinality::int;
    END LOOP;
    IF p_leader IS NOT NULL AND cardinality(made) = 1 AND cardinality(entry) = 1 THEN
        IF pipeline.join_message(p_leader, p_definition, entry[1], made[1]) THEN
            leaders[1] := p_leader;
        ELSE
            SELECT CASE WHEN pipeline.may_be_joined(t.handler, p_grace) THEN '{}'::text[] END INTO leads_
              FROM pipeline.workflow_tasks t WHERE t.definition_id = p_definition AND t.task_id = entry[1];
        END IF;
    END IF;
    RETURN QUERY
        WITH first AS MATERIALIZED (SELECT * FROM pipeline.share(p_definition, entry, p_grace > '0')),
        ready_ AS MATERIALIZED (
            SELECT m.number, f.number AS place, m.execution_id, f.task_id, f.handler, f.timeout,
                   CASE m.leader WHEN m.execution_id THEN f.led_by ELSE f.task_id END AS led_by,
                   nullif(m.leader, m.execution_id) AS led_in
              FROM unnest(made, numbers, leaders) m (execution_id, number, leader), first f),
        started AS (
            INSERT INTO pipeline.task_executions (
                execution_id, task_id, handler, ready_at, due_at, hints, led_by, led_in, leads)
            SELECT r.execution_id, r.task_id, r.handler, now_, now_ + p_grace, (p_grace > '0')::int, r.led_by, r.led_in, leads_
              FROM ready_ r)
        SELECT r.number, true, r.execution_id, true,
               array_agg((r.execution_id, r.task_id, 0, r.handler, r.timeout, r.led_by, r.led_in)::pipeline.ready_task
                         ORDER BY r.place) FILTER (WHERE r.led_in = p_leader IS NOT TRUE)
          FROM ready_ r GROUP BY r.number, r.execution_id;
    INSERT INTO pipeline.task_executions (execution_id, task_id, handler)
        SELECT m.execution_id, t.task_id, t.handler FROM unnest(made) m (execution_id), pipeline.workflow_tasks t
         WHERE t.definition_id = p_definition AND t.waits_for <> '{}';
    INSERT INTO pipeline.join_counters (execution_id, number, slot, remaining)
        SELECT m.execution_id, h.number, s.slot, s.remaining
          FROM unnest(made) m (execution_id), pipeline.workflow_headers h, LATERAL (
            SELECT 0 AS slot, CASE h.slots WHEN '{}' THEN cardinality(h.tasks) ELSE cardinality(h.slots) END AS remaining
            UNION ALL
            SELECT n.slot, n.tasks FROM unnest(h.slots) WITH ORDINALITY n (tasks, slot)) s
         WHERE h.definition_id = p_definition;
END $$;

CREATE OR REPLACE FUNCTION pipeline.start_task(
    p_execution text, p_definition bigint, p_task text, p_epoch int, p_worker bigint, p_handler text,
    p_room double precision, p_hard_limit interval
) RETURNS pipeline.claimed_task LANGUAGE plpgsql AS $$
DECLARE
    now_ timestamptz := pipeline.clock();
    started pipeline.claimed_task;
BEGIN
    UPDATE pipeline.task_executions t
       SET status = 'running', epoch = t.epoch + 1, attempt = t.attempt + 1, hints = 0, due_at = NULL, led_by = NULL,
           ready_at = coalesce(t.ready_at, now_), worker_id = p_worker, started_at = now_, progress = NULL,
           progress_message = NULL, error_type = NULL, error_message = NULL, error_traceback = NULL,
           deadline_at = now_ + p_hard_limit + make_interval(secs => w.timeout)
      FROM pipeline.workflow_tasks w, pipeline.workers k
     WHERE t.execution_id = p_execution AND t.task_id = p_task AND t.status IN ('pending', 'retry')
       AND (t.epoch = p_epoch AND t.due_at IS NOT NULL OR p_epoch IS NULL AND t.due_at IS NULL)
       AND w.definition_id = p_definition AND w.task_id = p_task AND w.timeout <= p_room
       AND k.worker_id = p_worker AND k.expires_at > now_
       AND (t.handler = p_handler OR p_handler IS NULL AND t.handler = ANY (k.handlers))
    RETURNING t.execution_id, t.task_id, t.handler, t.epoch, t.attempt, t.retries, coalesce(t.params::json, w.params),
              CASE WHEN cardinality(w.dependencies) BETWEEN 1 AND 16 THEN (
                  SELECT CASE WHEN coalesce(sum(CASE WHEN pg_column_size(r.result) > 8192 THEN 8193  -- compressed
                                                     ELSE octet_length(r.result::text) END), 0) <= 8192
                              THEN jsonb_object_agg(r.task_id, r.result) END
                    FROM pipeline.task_executions r
                   WHERE r.execution_id = p_execution AND r.task_id = ANY (w.dependencies)) END,
              w.timeout, w.dependencies, w.retry_policy, CASE WHEN t.attempt = 1 THEN t.leads END INTO started;
    RETURN started;
END $$;

CREATE OR REPLACE FUNCTION pipeline.taken_before(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_handler text, p_room double precision
) RETURNS pipeline.claimed_task LANGUAGE plpgsql STABLE AS $$
DECLARE
    taken pipeline.claimed_task;
BEGIN
    SELECT t.execution_id, t.task_id, t.handler, t.epoch, t.attempt, t.retries, coalesce(t.params::json, w.params),
           NULL::jsonb, w.timeout, w.dependencies, w.retry_policy, CASE WHEN t.attempt = 1 THEN t.leads END INTO taken
      FROM pipeline.task_executions t
      JOIN pipeline.workflow_executions e USING (execution_id)
      JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = t.task_id
     WHERE t.execution_id = p_execution AND t.task_id = p_task AND t.epoch = p_epoch + 1
       AND t.handler = p_handler AND t.status = 'running' AND t.worker_id = p_worker
       AND w.timeout <= p_room AND e.verdict IS NULL AND NOT e.paused;
    RETURN taken;
END $$;

CREATE FUNCTION pipeline.claim_task(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_hard_limit interval, p_handler text
) RETURNS SETOF pipeline.claimed_task LANGUAGE plpgsql AS $$
DECLARE
    taken pipeline.claimed_task;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);  -- a forgotten claim is only a second attempt
    PERFORM pg_advisory_xact_lock_shared(pipeline.lock_key(p_execution));
    taken := pipeline.take_task(p_execution, p_task, p_epoch, p_worker, p_handler, 'infinity', p_hard_limit);
    IF taken.task_id IS NULL THEN
        taken := pipeline.taken_before(p_execution, p_task, p_epoch, p_worker, p_handler, 'infinity');
    END IF;
    IF taken.task_id IS NOT NULL THEN
        RETURN NEXT taken;
    END IF;
END $$;

CREATE FUNCTION pipeline.complete_task(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_result jsonb, p_grace interval,
    p_room double precision, p_next_execution text, p_next text, p_next_epoch int, p_handler text, p_hard_limit interval,
    p_durable boolean, p_with_state boolean, p_closing text[], OUT outcome text, OUT ready pipeline.ready_task[],
    OUT next pipeline.claimed_task, OUT state jsonb, OUT kept boolean, OUT durable boolean, OUT closing text[]
) LANGUAGE plpgsql AS $$
DECLARE
    x record;
    remaining_ int;
    released text[];
    ended boolean := false;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(pipeline.lock_key(p_execution));
    SELECT e.definition_id, e.verdict, e.careful, e.paused, w.releases, w.headers, w.slots INTO x
      FROM pipeline.workflow_executions e
      LEFT JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = p_task
     WHERE e.execution_id = p_execution;
    outcome := 'done'; kept := false; durable := true;
    IF x.verdict IS NOT NULL OR x.careful THEN
        outcome := 'again';
        RETURN;
    END IF;
    UPDATE pipeline.task_executions t
       SET status = 'success', result = p_result, finished_at = pipeline.clock(), deadline_at = NULL
     WHERE t.execution_id = p_execution AND t.task_id = p_task
       AND t.status = 'running' AND t.epoch = p_epoch AND t.worker_id = p_worker;
    IF NOT FOUND THEN
        SELECT r.outcome, r.ready INTO outcome, ready FROM pipeline.repeat_of(
            p_execution, x.definition_id, p_task, p_epoch, p_worker, 'success') r;
        IF outcome = 'done' THEN
            PERFORM pipeline.close_executions(p_closing || p_execution);
            closing := '{}';
        END IF;
        IF outcome = 'done' AND p_room > 0 THEN
            SELECT t.execution_id, t.task_id, t.handler, t.epoch, t.attempt, t.retries, coalesce(t.params::json, w.params),
                   NULL, w.timeout, w.dependencies, w.retry_policy, CASE WHEN t.attempt = 1 THEN t.leads END INTO next
              FROM pipeline.task_executions t
              JOIN pipeline.workflow_tasks w ON w.definition_id = x.definition_id AND w.task_id = t.task_id
             WHERE t.execution_id = p_execution AND t.status = 'running' AND t.worker_id = p_worker AND w.timeout <= p_room
               AND (w.waits_for @> ARRAY[p_task]
                    OR p_execution = p_next_execution AND t.task_id = p_next AND t.epoch = p_next_epoch + 1) LIMIT 1;
            IF next.task_id IS NULL AND p_next_execution <> p_execution THEN
                next := pipeline.taken_before(p_next_execution, p_next, p_next_epoch, p_worker, p_handler, p_room);
                state := CASE WHEN p_with_state THEN pipeline.state_of(next.execution_id) END;
            END IF;
        END IF;
        RETURN;
    END IF;
    released := x.releases;
    FOR n IN 1 .. cardinality(x.headers) LOOP  -- ascending: the lock order of counters
        UPDATE pipeline.join_counters c SET remaining = c.remaining - 1
         WHERE c.execution_id = p_execution AND c.number = x.headers[n] AND c.slot = coalesce(x.slots[n], 0)
        RETURNING c.remaining INTO remaining_;
        IF remaining_ = 0 AND x.slots[n] > 0 THEN
            UPDATE pipeline.join_counters c SET remaining = c.remaining - 1
             WHERE c.execution_id = p_execution AND c.number = x.headers[n] AND c.slot = 0
            RETURNING c.remaining INTO remaining_;
        END IF;
        IF remaining_ = 0 THEN
            ended := ended OR x.headers[n] = 0;
            released := released || (SELECT h.bodies FROM pipeline.workflow_headers h
                                      WHERE h.definition_id = x.definition_id AND h.number = x.headers[n]);
        END IF;
    END LOOP;
    IF p_next_execution <> p_execution AND p_room > 0 THEN
        next := pipeline.go_on(p_next_execution, p_next, p_next_epoch, p_worker, p_handler, p_room, p_hard_limit);
        state := CASE WHEN p_with_state THEN pipeline.state_of(next.execution_id) END;
    ELSIF p_next_execution = p_execution AND released = '{}' AND p_room > 0 AND NOT x.paused THEN
        next := pipeline.start_task(
            p_execution, x.definition_id, p_next, p_next_epoch, p_worker, p_handler, p_room, p_hard_limit);
    END IF;
    IF released <> '{}' AND next.task_id IS NULL THEN
        IF p_room > 0 AND NOT x.paused THEN
            next := pipeline.start_task(
                p_execution, x.definition_id, released[1], NULL, p_worker, NULL, p_room, p_hard_limit);
        END IF;
        IF next.task_id IS NULL OR cardinality(released) > 1 THEN
            ready := pipeline.make_ready(p_execution, x.definition_id, released, p_grace);
        END IF;
    ELSIF released <> '{}' THEN
        ready := pipeline.make_ready(p_execution, x.definition_id, released, p_grace);
        kept := coalesce(ready[1].timeout <= p_room, false)
            AND NOT EXISTS (SELECT 1 FROM unnest(ready[2:]) r WHERE r.led_by IS NULL)
            AND EXISTS (SELECT 1 FROM pipeline.workers k
                         WHERE k.worker_id = p_worker AND ready[1].handler = ANY (k.handlers));
    END IF;
    durable := p_durable OR released <> '{}' AND NOT kept OR next.task_id IS NULL AND (ended OR p_closing <> '{}');
    IF durable THEN
        closing := '{}';
        IF ended THEN
            PERFORM pipeline.close_execution(p_execution, 'success');
        END IF;
        IF p_closing <> '{}' THEN
            PERFORM pipeline.close_executions(p_closing);
        END IF;
        RETURN;
    END IF;
    PERFORM set_config('synchronous_commit', 'off', true);
    IF ended THEN
        closing := p_closing || p_execution;
        INSERT INTO pipeline.closings VALUES (p_execution, pipeline.clock() + p_grace / 4)
            ON CONFLICT (execution_id) DO UPDATE SET due_at = excluded.due_at;  -- of an earlier run; nobody may delete it now
    END IF;
END $$;

CREATE FUNCTION pipeline.close_if_over(p_execution text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM pipeline.workflow_executions e
       JOIN pipeline.join_counters c ON c.execution_id = e.execution_id AND c.number = 0 AND c.slot = 0
      WHERE e.execution_id = p_execution AND e.finished_at IS NULL AND e.verdict IS NULL AND c.remaining = 0;
    IF NOT FOUND OR EXISTS (  -- a rerun where tasks run one after another, whose last one succeeded before
            SELECT 1 FROM pipeline.task_executions t WHERE t.execution_id = p_execution AND t.finished_at IS NULL) THEN
        RETURN false;
    END IF;
    PERFORM pipeline.close_execution(p_execution, 'success');
    RETURN true;
END $$;

CREATE FUNCTION pipeline.close_executions(p_executions text[]) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    over text;
    closed int := 0;
BEGIN
    FOR over IN SELECT c.execution_id FROM pipeline.closings c WHERE c.execution_id = ANY (p_executions)
                 ORDER BY c.execution_id FOR UPDATE SKIP LOCKED LOOP
        CONTINUE WHEN NOT pg_try_advisory_xact_lock_shared(pipeline.lock_key(over));
        closed := closed + pipeline.close_if_over(over)::int;
        DELETE FROM pipeline.closings c WHERE c.execution_id = over;
    END LOOP;
    RETURN closed;
END $$;

CREATE OR REPLACE FUNCTION pipeline.cancel_execution(p_execution text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    x record;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    PERFORM pipeline.close_if_over(p_execution);
    SELECT e.status, e.verdict INTO x FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    IF x.status NOT IN ('pending', 'running', 'retry') OR x.verdict = 'cancelled' THEN
        RETURN x.status;
    END IF;
    INSERT INTO pipeline.workflow_events (execution_id, kind, user_id) VALUES (p_execution, 'cancel', p_user);
    UPDATE pipeline.workflow_executions e SET verdict = NULL WHERE e.execution_id = p_execution;  -- outweighs a failure
    PERFORM pipeline.decide(p_execution, 'cancelled', 'cancelled', 'cancelled' || coalesce(' by ' || p_user, ''));
    PERFORM pg_notify('pipeline_stop', p_execution);
    RETURN x.status;
END $$;

CREATE OR REPLACE FUNCTION pipeline.pause_execution(p_execution text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    found_ text;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    PERFORM pipeline.close_if_over(p_execution);
    SELECT e.status INTO found_ FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    UPDATE pipeline.workflow_executions e SET paused = true
     WHERE e.execution_id = p_execution AND NOT e.paused AND e.verdict IS NULL
       AND e.status IN ('pending', 'running', 'retry');
    IF FOUND THEN
        INSERT INTO pipeline.workflow_events (execution_id, kind, user_id) VALUES (p_execution, 'pause', p_user);
    END IF;
    RETURN found_;
END $$;

CREATE OR REPLACE FUNCTION pipeline.reopen_execution(p_execution text, p_user text, p_from text, p_params jsonb)
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    x record;
    reset text[];
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    PERFORM pipeline.close_if_over(p_execution);
    SELECT e.status, e.definition_id, (d.definition ->> 'timeout')::float8 AS timeout,
           d.definition ->> 'enable_parallel' IS NOT DISTINCT FROM 'false' AS sequential INTO x
      FROM pipeline.workflow_executions e JOIN pipeline.workflow_definitions d USING (definition_id)
     WHERE e.execution_id = p_execution AND NOT e.forgotten;
    IF x.status IS NULL OR NOT (x.status IN ('failed', 'cancelled') OR x.status = 'success' AND p_from IS NOT NULL) THEN
        RETURN x.status;
    END IF;
    WITH RECURSIVE downstream AS (
        SELECT w.task_id FROM pipeline.workflow_tasks w
         WHERE w.definition_id = x.definition_id AND w.task_id = p_from
        UNION
        SELECT w.task_id FROM downstream d
          JOIN pipeline.workflow_tasks w ON w.definition_id = x.definition_id AND w.dependencies @> ARRAY[d.task_id])
    SELECT array_agg(t.task_id) INTO reset FROM pipeline.task_executions t
     WHERE t.execution_id = p_execution
       AND (t.status <> 'success' OR t.task_id IN (SELECT d.task_id FROM downstream d));
    IF p_from IS NOT NULL AND NOT p_from = ANY (coalesce(reset, '{}')) THEN
        RETURN 'no such task';
    END IF;
    INSERT INTO pipeline.workflow_events (execution_id, task_id, kind, user_id, detail)
        VALUES (p_execution, p_from, CASE WHEN p_from IS NULL THEN 'retry' ELSE 'rerun' END, p_user,
                CASE WHEN p_params IS NULL THEN '{}' ELSE jsonb_build_object('params', p_params) END);
    INSERT INTO pipeline.task_attempts (execution_id, task_id, epoch, attempt, outcome, worker_id, started_at, ended_at,
                                        error_type, error_message, error_traceback)
        SELECT t.execution_id, t.task_id, t.epoch, t.attempt, t.status, t.worker_id, t.started_at, t.finished_at,
               t.error_type, t.error_message, t.error_traceback
          FROM pipeline.task_executions t
         WHERE t.execution_id = p_execution AND t.task_id = ANY (reset) AND t.attempt > 0
        ON CONFLICT DO NOTHING;  -- a task that was waiting for a retry has its attempt there already
    UPDATE pipeline.workflow_executions e
       SET status = 'retry', verdict = NULL, error_message = NULL, finished_at = NULL, run = e.run + 1,
           careful = x.sequential, deadline_at = pipeline.clock() + make_interval(secs => x.timeout)
     WHERE e.execution_id = p_execution;
    UPDATE pipeline.task_executions t
       SET status = 'pending', epoch = t.epoch + 1, retries = 0, losses = 0, hints = 0, finished_at = NULL,
           due_at = NULL, led_by = NULL, ready_at = NULL, worker_id = NULL, result = NULL,
           error_type = NULL, error_message = NULL, error_traceback = NULL,
           params = CASE WHEN t.task_id = p_from THEN coalesce(p_params, t.params) ELSE t.params END
     WHERE t.execution_id = p_execution AND t.task_id = ANY (reset);
    UPDATE pipeline.join_counters c SET remaining = o.remaining
      FROM pipeline.open_places(p_execution, x.definition_id, '{success}') o
     WHERE c.execution_id = p_execution AND c.number = o.number AND c.slot = o.slot;
    UPDATE pipeline.task_executions t SET due_at = pipeline.clock(), ready_at = pipeline.clock()
      FROM pipeline.workflow_tasks w
     WHERE t.execution_id = p_execution AND w.definition_id = x.definition_id AND w.task_id = t.task_id
       AND t.status = 'pending'
       AND NOT EXISTS (SELECT 1 FROM pipeline.task_executions d
                        WHERE d.execution_id = p_execution AND d.task_id = ANY (w.waits_for) AND d.status <> 'success')
       AND (NOT x.sequential OR w.number = (
           SELECT min(v.number) FROM pipeline.workflow_tasks v JOIN pipeline.task_executions o
               ON o.execution_id = p_execution AND o.task_id = v.task_id AND o.status <> 'success'
            WHERE v.definition_id = x.definition_id));
    IF reset IS NULL THEN
        PERFORM pipeline.close_execution(p_execution, 'success');
    END IF;
    RETURN x.status;
END $$;

CREATE OR REPLACE FUNCTION pipeline.mark_task(
    p_execution text, p_task text, p_status text, p_result jsonb, p_user text, p_reason text, p_grace interval
) RETURNS TABLE (status text, changed boolean, ready pipeline.ready_task[]) LANGUAGE plpgsql AS $$
DECLARE
    x record;
    found_ text;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    PERFORM pipeline.close_if_over(p_execution);
    SELECT e.status, e.verdict, e.definition_id,
           d.definition ->> 'enable_parallel' IS NOT DISTINCT FROM 'false' AS sequential INTO x
      FROM pipeline.workflow_executions e JOIN pipeline.workflow_definitions d USING (definition_id)
     WHERE e.execution_id = p_execution AND NOT e.forgotten;
    SELECT t.status INTO found_ FROM pipeline.task_executions t
     WHERE t.execution_id = p_execution AND t.task_id = p_task AND x.status IS NOT NULL;
    IF found_ IS NULL OR found_ = 'success' OR x.status = 'success' OR (x.verdict IS NOT NULL AND found_ = 'running') THEN
        RETURN QUERY SELECT found_, false, NULL::pipeline.ready_task[];
        RETURN;
    END IF;
    PERFORM 1 FROM pipeline.workflow_tasks w
       JOIN pipeline.workflow_tasks v ON v.definition_id = w.definition_id
        AND (v.task_id = ANY (w.waits_for) OR x.sequential AND v.number < w.number)
       JOIN pipeline.task_executions d ON d.execution_id = p_execution AND d.task_id = v.task_id
        AND d.status <> 'success' AND (d.status <> 'skipped' OR x.verdict IS NOT NULL)
      WHERE w.definition_id = x.definition_id AND w.task_id = p_task;
    IF FOUND THEN
        RETURN QUERY SELECT 'waiting', false, NULL::pipeline.ready_task[];
        RETURN;
    END IF;
    IF x.status IN ('failed', 'cancelled') THEN
        PERFORM pipeline.reopen_execution(p_execution, p_user, NULL, NULL);
    ELSIF found_ NOT IN ('pending', 'retry', 'running') THEN
        RETURN QUERY SELECT found_, false, NULL::pipeline.ready_task[];
        RETURN;
    END IF;
    INSERT INTO pipeline.workflow_events (execution_id, task_id, kind, user_id, detail)
        VALUES (p_execution, p_task, 'mark', p_user, jsonb_build_object('status', p_status, 'reason', p_reason));
    INSERT INTO pipeline.task_attempts (execution_id, task_id, epoch, attempt, outcome, worker_id, started_at,
                                        error_type, error_message, error_traceback)
        SELECT t.execution_id, t.task_id, t.epoch, t.attempt, 'released', t.worker_id, t.started_at,
               t.error_type, 'decided by hand while it ran', t.error_traceback
          FROM pipeline.task_executions t
         WHERE t.execution_id = p_execution AND t.task_id = p_task AND t.status = 'running'
        ON CONFLICT DO NOTHING;
    UPDATE pipeline.task_executions t
       SET status = p_status, epoch = t.epoch + 1, due_at = NULL, led_by = NULL, deadline_at = NULL, finished_at = pipeline.clock(),
           result = CASE p_status WHEN 'success' THEN p_result END, error_type = NULL, error_traceback = NULL,
           error_message = format('marked as %s by %s: %s', p_status, coalesce(p_user, 'somebody'), p_reason)
     WHERE t.execution_id = p_execution AND t.task_id = p_task;
    IF p_status = 'skipped' THEN
        UPDATE pipeline.workflow_executions e SET careful = true WHERE e.execution_id = p_execution;
    END IF;
    RETURN QUERY SELECT found_, true, pipeline.release(p_execution, x.definition_id, p_task, p_grace);
END $$;

CREATE OR REPLACE FUNCTION pipeline.expire_execution(p_execution text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    reason text;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    PERFORM pipeline.close_if_over(p_execution);
    SELECT CASE WHEN e.deadline_at <= pipeline.clock() THEN 'the execution ran longer than the timeout of its workflow'
                ELSE format('task %s waited longer for a worker than the queue_timeout of its workflow', waiting.task_id)
           END INTO reason
      FROM pipeline.workflow_executions e
      LEFT JOIN LATERAL (
        SELECT t.task_id FROM pipeline.task_executions t
         WHERE t.execution_id = e.execution_id AND t.status = 'pending' AND t.due_at IS NOT NULL AND NOT e.paused
           AND t.ready_at <= pipeline.clock() - e.queue_timeout ORDER BY t.ready_at LIMIT 1) waiting ON true
     WHERE e.execution_id = p_execution AND e.verdict IS NULL AND e.status IN ('pending', 'running', 'retry')
       AND (e.deadline_at <= pipeline.clock() OR waiting.task_id IS NOT NULL);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM pipeline.decide(p_execution, 'failed', 'skipped', reason);
    PERFORM pg_notify('pipeline_stop', p_execution);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION pipeline.audit() RETURNS TABLE (violation text, execution_id text, subject text) LANGUAGE sql AS $$
    WITH task AS (
        SELECT t.*, w.dependencies, e.status AS execution_status, e.verdict, e.paused, e.careful,
               EXISTS (SELECT 1 FROM pipeline.task_executions o
                        WHERE o.execution_id = t.execution_id AND o.task_id = ANY (w.waits_for)
                          AND o.status IN ('pending', 'running', 'retry'))
               OR e.definition_id IN (SELECT d.definition_id FROM pipeline.workflow_definitions d
                                       WHERE d.definition ->> 'enable_parallel' = 'false') AND EXISTS (
                   SELECT 1 FROM pipeline.task_executions o
                     JOIN pipeline.workflow_tasks v ON v.definition_id = e.definition_id AND v.task_id = o.task_id
                    WHERE o.execution_id = t.execution_id AND v.number < w.number
                      AND o.status IN ('pending', 'running', 'retry')) AS blocked
          FROM pipeline.task_executions t
          JOIN pipeline.workflow_executions e USING (execution_id)
          JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = t.task_id)
    SELECT 'started before its dependencies succeeded', t.execution_id, t.task_id FROM task t
     WHERE t.status IN ('running', 'retry', 'success', 'failed')
       AND EXISTS (SELECT 1 FROM pipeline.task_executions d WHERE d.execution_id = t.execution_id
                    AND d.task_id = ANY (t.dependencies) AND d.status <> 'success')
    UNION ALL
    SELECT 'may start although something it waits for is open', t.execution_id, t.task_id FROM task t
     WHERE (t.due_at IS NOT NULL OR t.status = 'running') AND t.blocked
    UNION ALL
    SELECT 'never released', t.execution_id, t.task_id FROM task t
     WHERE t.status = 'pending' AND t.due_at IS NULL AND t.verdict IS NULL AND NOT t.blocked
    UNION ALL
    SELECT 'due although it ended', t.execution_id, t.task_id FROM task t
     WHERE t.finished_at IS NOT NULL AND t.due_at IS NOT NULL
    UNION ALL
    SELECT 'parked in an execution that is not paused', t.execution_id, t.task_id FROM task t
     WHERE t.due_at = 'infinity' AND NOT t.paused
    UNION ALL
    SELECT 'skipped, and completions do not look for it', t.execution_id, t.task_id FROM task t
     WHERE t.status = 'skipped' AND t.verdict IS NULL AND NOT t.careful
    UNION ALL
    SELECT 'result of a task that did not succeed', t.execution_id, t.task_id FROM task t
     WHERE t.status <> 'success' AND t.result IS NOT NULL
    UNION ALL
    SELECT 'to start in an execution that is decided', t.execution_id, t.task_id FROM task t
     WHERE t.verdict IS NOT NULL AND t.status IN ('pending', 'retry')
    UNION ALL
    SELECT 'waits for a retry that never comes', t.execution_id, t.task_id FROM task t
     WHERE t.status = 'retry' AND t.due_at IS NULL
    UNION ALL
    SELECT 'counter differs from its open tasks', e.execution_id, format('%s.%s', o.number, o.slot)
      FROM pipeline.workflow_executions e, LATERAL (
            SELECT number, slot FROM pipeline.open_places(e.execution_id, e.definition_id, '{success,skipped}') p
              FULL JOIN (SELECT c.number, c.slot, c.remaining FROM pipeline.join_counters c
                          WHERE c.execution_id = e.execution_id) c USING (number, slot)
             WHERE p.remaining IS DISTINCT FROM c.remaining) o
     WHERE e.verdict IS NULL AND e.status IN ('pending', 'running', 'retry')
    UNION ALL
    SELECT 'open task in an ended execution', t.execution_id, t.task_id FROM task t
     WHERE t.execution_status IN ('success', 'failed', 'cancelled') AND t.status IN ('pending', 'running', 'retry')
    UNION ALL
    SELECT 'ended although its verdict says otherwise', e.execution_id, e.status
      FROM pipeline.workflow_executions e
     WHERE e.status IN ('success', 'failed', 'cancelled') AND e.status <> coalesce(e.verdict, 'success')
    UNION ALL
    SELECT 'success with a task that failed', t.execution_id, t.task_id FROM task t
     WHERE t.execution_status = 'success' AND t.status IN ('failed', 'cancelled')
    UNION ALL
    SELECT 'nothing runs and nothing will', e.execution_id, e.status
      FROM pipeline.workflow_executions e
     WHERE e.status IN ('pending', 'running', 'retry')
       AND NOT EXISTS (SELECT 1 FROM pipeline.task_executions t WHERE t.execution_id = e.execution_id
                        AND (t.status = 'running' OR (t.status IN ('pending', 'retry') AND t.due_at IS NOT NULL)))
       AND NOT EXISTS (SELECT 1 FROM pipeline.closings c WHERE c.execution_id = e.execution_id)
    UNION ALL
    SELECT 'may start although its execution is gone', t.execution_id, t.task_id FROM pipeline.task_executions t
     WHERE (t.status IN ('pending', 'retry') AND t.due_at IS NOT NULL OR t.status = 'running')
       AND NOT EXISTS (SELECT 1 FROM pipeline.workflow_executions e WHERE e.execution_id = t.execution_id)
    UNION ALL
    SELECT 'running on a worker that never was', t.execution_id, t.task_id FROM task t
     WHERE t.status = 'running' AND NOT EXISTS (SELECT 1 FROM pipeline.workers k WHERE k.worker_id = t.worker_id)
$$;
