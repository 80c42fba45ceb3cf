-- Short CHECKs; an index of what runs that the end of an attempt cannot be tempted to use; fewer steps to release tasks;
-- several executions recorded at once, whose first tasks share messages.

CREATE FUNCTION pipeline.fits_execution(status text, verdict text, finished_at timestamptz) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN CASE WHEN finished_at IS NULL THEN status IN ('pending', 'running', 'retry')
                ELSE status IN ('success', 'failed', 'cancelled') END
       AND (verdict IS NULL OR verdict IN ('failed', 'cancelled'));
END $$;

CREATE FUNCTION pipeline.fits_task(
    status text, finished_at timestamptz, worker_id bigint, deadline_at timestamptz, due_at timestamptz, led_by text
) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN CASE WHEN finished_at IS NULL THEN status IN ('pending', 'running', 'retry')
                ELSE status IN ('success', 'failed', 'skipped', 'cancelled') END
       AND (status <> 'running' OR worker_id IS NOT NULL AND deadline_at IS NOT NULL AND due_at IS NULL)
       AND (led_by IS NULL OR due_at IS NOT NULL);
END $$;

ALTER TABLE pipeline.workflow_executions
    DROP CONSTRAINT workflow_executions_status, DROP CONSTRAINT workflow_executions_verdict,
    DROP CONSTRAINT workflow_executions_finished,
    ADD CONSTRAINT workflow_executions_fits CHECK (pipeline.fits_execution(status, verdict, finished_at));
ALTER TABLE pipeline.task_executions
    DROP CONSTRAINT task_executions_status, DROP CONSTRAINT task_executions_running, DROP CONSTRAINT task_executions_led,
    DROP CONSTRAINT task_executions_finished,
    ADD CONSTRAINT task_executions_fits CHECK (pipeline.fits_task(status, finished_at, worker_id, deadline_at, due_at, led_by));

DROP INDEX pipeline.task_executions_running;
CREATE INDEX task_executions_running ON pipeline.task_executions (worker_id)
    WHERE status = 'running' AND deadline_at IS NOT NULL;

ALTER TABLE pipeline.task_executions ADD COLUMN led_in text COLLATE "C";
DROP FUNCTION pipeline.create_execution(text, bigint, text, text, jsonb, text, jsonb, interval, interval, interval);
DROP FUNCTION pipeline.start_task(text, bigint, text, int, bigint, text, double precision, interval);
DROP FUNCTION pipeline.claim_task(text, text, int, bigint, text, interval);
DROP FUNCTION pipeline.complete_task(
    text, text, int, bigint, jsonb, interval, double precision, text, int, text, interval);
DROP TYPE pipeline.claimed_task;
ALTER TYPE pipeline.ready_task ADD ATTRIBUTE led_in text;
CREATE TYPE pipeline.claimed_task AS (
    execution_id text, task_id text, handler text, epoch int, attempt int, retries int, params json, results jsonb,
    timeout double precision, dependencies text[], retry_policy json);
ALTER TABLE pipeline.workflow_executions ADD COLUMN awaited boolean NOT NULL DEFAULT false;

CREATE FUNCTION pipeline.fleet(OUT processes int, OUT slow text[], OUT quick text[]) LANGUAGE plpgsql STABLE AS $$
DECLARE
    known record;
BEGIN
    processes := 0; slow := '{}'; quick := '{}';
    FOR known IN SELECT k.slow, k.quick FROM pipeline.workers k WHERE k.expires_at > pipeline.clock() LOOP
        processes := processes + 1;
        IF NOT known.slow <@ slow THEN
            slow := slow || known.slow;
        END IF;
        IF NOT known.quick <@ quick THEN
            quick := quick || known.quick;
        END IF;
    END LOOP;
END $$;

CREATE OR REPLACE FUNCTION pipeline.share(p_definition bigint, p_tasks text[], p_together boolean)
RETURNS TABLE (task_id text, number int, handler text, timeout double precision, led_by text) LANGUAGE plpgsql STABLE AS $$
DECLARE
    each_ int := 1;
    slow_ text[];
    quick_ text[] := '{}';
BEGIN
    IF p_together AND cardinality(p_tasks) > 1 THEN
        SELECT ceil(cardinality(p_tasks)::float8 / greatest(f.processes, 1)), f.slow, f.quick INTO each_, slow_, quick_
          FROM pipeline.fleet() f;
    END IF;
    IF each_ = 1 AND quick_ = '{}' THEN
        RETURN QUERY
            SELECT w.task_id, w.number, w.handler, w.timeout, NULL::text
              FROM unnest(p_tasks) n (task_id), LATERAL (
                SELECT p.* FROM pipeline.workflow_tasks p
                 WHERE p.definition_id = p_definition AND p.task_id = n.task_id OFFSET 0) w ORDER BY w.number;
        RETURN;
    END IF;
    RETURN QUERY
        SELECT m.task_id, m.number, m.handler, m.timeout, CASE WHEN m.shares THEN nullif(m.leader, m.task_id) END FROM (
            SELECT d.*, first_value(d.task_id) OVER (
                       PARTITION BY d.handler, d.timeout, d.place / d.most, (d.bytes - 1) / d.room ORDER BY d.number) AS leader
              FROM (SELECT w.task_id, w.handler, w.timeout, w.number, w.handler <> ALL (slow_) AS shares,
                           CASE WHEN w.handler = ANY (quick_) THEN greatest(4, each_) ELSE each_ END AS most,
                           row_number() OVER alike - 1 AS place,
                           sum(octet_length(w.task_id) + 8) OVER alike AS bytes,
                           greatest(1, (330 - 3.5 * max(octet_length(w.task_id)) OVER (PARTITION BY w.handler, w.timeout)
                                        - octet_length(w.handler)) * 0.74)::int AS room
                      FROM unnest(p_tasks) n (task_id), LATERAL (
                        SELECT p.* FROM pipeline.workflow_tasks p
                         WHERE p.definition_id = p_definition AND p.task_id = n.task_id OFFSET 0) w  -- one look-up each
                    WINDOW alike AS (PARTITION BY w.handler, w.timeout ORDER BY w.number)) d) m ORDER BY m.number;
END $$;

CREATE FUNCTION pipeline.create_execution(
    p_execution text, p_definition bigint, p_user text, p_key text, p_input jsonb, p_input_digest text,
    p_variables jsonb, p_deadline interval, p_queue_timeout interval, p_grace interval, p_leader pipeline.ready_task
) RETURNS TABLE (created boolean, execution_id text, same_work boolean, ready pipeline.ready_task[]) LANGUAGE plpgsql AS $$
DECLARE
    now_ timestamptz := pipeline.clock();  -- asked for each task, it would take as long as a sixth of the whole
    workflow text;
    entry text[];
BEGIN
    SELECT d.workflow_id INTO STRICT workflow FROM pipeline.workflow_definitions d WHERE d.definition_id = p_definition;
    INSERT INTO pipeline.workflow_executions AS e
        (execution_id, definition_id, workflow_id, created_by, idempotency_key, input_digest, deadline_at,
         queue_timeout)
        VALUES (p_execution, p_definition, workflow, p_user, p_key, p_input_digest, pipeline.clock() + p_deadline,
                p_queue_timeout)
        ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN QUERY SELECT false, e.execution_id, e.definition_id = p_definition AND e.input_digest = p_input_digest,
                            NULL::pipeline.ready_task[]
            FROM pipeline.workflow_executions e WHERE e.workflow_id = workflow AND e.idempotency_key = p_key;
        RETURN;
    END IF;
    INSERT INTO pipeline.workflow_states VALUES (p_execution, p_variables, p_input) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN  -- of an execution that is forgotten, whose partition is still there
        DELETE FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
        RETURN;
    END IF;
    entry := ARRAY(SELECT t.task_id FROM pipeline.workflow_tasks t
                    WHERE t.definition_id = p_definition AND t.waits_for = '{}');
    WITH first AS MATERIALIZED (SELECT * FROM pipeline.share(p_definition, entry, p_grace > '0')),
    made AS (
        INSERT INTO pipeline.task_executions (execution_id, task_id, handler, ready_at, due_at, hints, led_by, led_in)
        SELECT p_execution, f.task_id, f.handler, now_, now_ + p_grace, (p_grace > '0')::int,
               coalesce(p_leader.task_id, f.led_by), p_leader.execution_id FROM first f)
    SELECT array_agg((p_execution, f.task_id, 0, f.handler, f.timeout, coalesce(p_leader.task_id, f.led_by),
                      p_leader.execution_id)::pipeline.ready_task ORDER BY f.number)
      INTO ready FROM first f;
    INSERT INTO pipeline.task_executions (execution_id, task_id, handler)
        SELECT p_execution, t.task_id, t.handler
          FROM pipeline.workflow_tasks t WHERE t.definition_id = p_definition AND t.waits_for <> '{}';
    INSERT INTO pipeline.join_counters (execution_id, number, slot, remaining)
        SELECT p_execution, h.number, s.slot, s.remaining
          FROM pipeline.workflow_headers h, LATERAL (
            SELECT 0 AS slot, CASE h.slots WHEN '{}' THEN cardinality(h.tasks) ELSE cardinality(h.slots) END AS remaining
            UNION ALL
            SELECT n.slot, n.tasks FROM unnest(h.slots) WITH ORDINALITY n (tasks, slot)) s
         WHERE h.definition_id = p_definition;
    RETURN QUERY SELECT true, p_execution, true, ready;
END $$;

CREATE FUNCTION pipeline.create_executions(
    p_definition bigint, p_user text, p_work jsonb, p_variables jsonb, p_deadline interval, p_queue_timeout interval,
    p_grace interval
) RETURNS TABLE (number int, created boolean, execution_id text, same_work boolean, ready pipeline.ready_task[])
LANGUAGE plpgsql AS $$
DECLARE
    known record;
    given record;
    made record;
    leader pipeline.ready_task;
    each_ int := 1;
    led int := 0;
BEGIN
    SELECT f.* INTO known FROM pipeline.fleet() f WHERE p_grace > '0';
    FOR given IN SELECT w.* FROM ROWS FROM (jsonb_to_recordset(p_work) AS (
            execution_id text, idempotency_key text, input_data jsonb, input_digest text)) WITH ORDINALITY w LOOP
        SELECT c.* INTO made FROM pipeline.create_execution(
            given.execution_id, p_definition, p_user, given.idempotency_key, given.input_data, given.input_digest,
            p_variables, p_deadline, p_queue_timeout, p_grace, CASE WHEN led < each_ - 1 THEN leader END) c;
        CONTINUE WHEN NOT FOUND;
        number := given.ordinality; created := made.created; execution_id := made.execution_id;
        same_work := made.same_work; ready := made.ready;
        RETURN NEXT;
        CONTINUE WHEN known.processes IS NULL OR cardinality(made.ready) IS DISTINCT FROM 1;
        IF made.ready[1].led_in IS NOT NULL THEN
            led := led + 1;
        ELSIF made.ready[1].handler <> ALL (known.slow) THEN
            leader := made.ready[1];
            led := 0;
            each_ := least(
                greatest(ceil(jsonb_array_length(p_work)::float8 / greatest(known.processes, 1))::int,
                         CASE WHEN leader.handler = ANY (known.quick) THEN 4 END),
                1 + floor((330 - 3.5 * octet_length(leader.task_id) - octet_length(leader.handler)) * 0.74
                          / (octet_length(leader.execution_id) + octet_length(leader.task_id) + 12))::int);
        END IF;
    END LOOP;
END $$;

CREATE FUNCTION pipeline.start_task(
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
    RETURNING t.execution_id, t.task_id, t.handler, t.epoch, t.attempt, t.retries,
              coalesce(t.params::json, w.params), NULL, w.timeout, w.dependencies, w.retry_policy INTO started;
    IF cardinality(started.dependencies) BETWEEN 1 AND 16 THEN
        started.results := (
            SELECT CASE WHEN coalesce(sum(CASE WHEN pg_column_size(r.result) > 8192 THEN 8193  -- compressed
                                               ELSE octet_length(r.result::text) END), 0) <= 8192
                        THEN jsonb_object_agg(r.task_id, r.result) END
              FROM pipeline.task_executions r
             WHERE r.execution_id = p_execution AND r.task_id = ANY (started.dependencies));
    END IF;
    RETURN started;
END $$;

CREATE FUNCTION pipeline.take_task(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_handler text, p_room double precision,
    p_hard_limit interval
) RETURNS pipeline.claimed_task LANGUAGE plpgsql AS $$
DECLARE
    x record;
    started pipeline.claimed_task;
BEGIN
    SELECT e.definition_id, e.status, e.verdict, e.paused INTO x
      FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    IF NOT FOUND OR x.paused OR x.verdict IS NOT NULL OR x.status NOT IN ('pending', 'running', 'retry') THEN
        RETURN NULL;
    END IF;
    started := pipeline.start_task(
        p_execution, x.definition_id, p_task, p_epoch, p_worker, p_handler, p_room, p_hard_limit);
    IF started.task_id IS NOT NULL AND x.status IN ('pending', 'retry') THEN
        UPDATE pipeline.workflow_executions e
           SET status = 'running', started_at = coalesce(e.started_at, pipeline.clock())
         WHERE e.execution_id = p_execution AND e.status IN ('pending', 'retry');
    END IF;
    RETURN started;
END $$;

CREATE FUNCTION pipeline.taken_before(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_handler text, p_room double precision
) RETURNS pipeline.claimed_task LANGUAGE plpgsql STABLE AS $$
DECLARE
    taken pipeline.claimed_task;
BEGIN
    SELECT t.execution_id, t.task_id, t.handler, t.epoch, t.attempt, t.retries, coalesce(t.params::json, w.params),
           NULL::jsonb, w.timeout, w.dependencies, w.retry_policy INTO taken
      FROM pipeline.task_executions t
      JOIN pipeline.workflow_executions e USING (execution_id)
      JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = t.task_id
     WHERE t.execution_id = p_execution AND t.task_id = p_task AND t.epoch = p_epoch + 1
       AND t.handler = p_handler AND t.status = 'running' AND t.worker_id = p_worker
       AND w.timeout <= p_room AND e.verdict IS NULL AND NOT e.paused;
    RETURN taken;
END $$;

CREATE FUNCTION pipeline.state_of(p_execution text) RETURNS jsonb LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT jsonb_build_object('workflow_id', e.workflow_id, 'created_by', e.created_by,
                                      'variables', s.variables, 'input_data', s.input_data)
              FROM pipeline.workflow_executions e JOIN pipeline.workflow_states s USING (execution_id)
             WHERE e.execution_id = p_execution);
END $$;

CREATE FUNCTION pipeline.claim_task(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_handler text, p_hard_limit interval
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
    p_durable boolean, p_with_state boolean, OUT outcome text, OUT ready pipeline.ready_task[],
    OUT next pipeline.claimed_task, OUT state jsonb, OUT kept boolean, OUT durable boolean
) LANGUAGE plpgsql AS $$
DECLARE
    x record;
    plan record;
    remaining_ int;
    released text[];
    ended boolean := false;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(pipeline.lock_key(p_execution));
    SELECT e.definition_id, e.verdict, e.careful, e.paused INTO x
      FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
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
        IF outcome = 'done' AND p_room > 0 THEN
            SELECT t.execution_id, t.task_id, t.handler, t.epoch, t.attempt, t.retries, coalesce(t.params::json, w.params),
                   NULL, w.timeout, w.dependencies, w.retry_policy INTO next
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
    SELECT w.releases, w.headers, w.slots INTO plan
      FROM pipeline.workflow_tasks w WHERE w.definition_id = x.definition_id AND w.task_id = p_task;
    released := plan.releases;
    FOR n IN 1 .. cardinality(plan.headers) LOOP  -- ascending: the lock order of counters
        UPDATE pipeline.join_counters c SET remaining = c.remaining - 1
         WHERE c.execution_id = p_execution AND c.number = plan.headers[n] AND c.slot = coalesce(plan.slots[n], 0)
        RETURNING c.remaining INTO remaining_;
        IF remaining_ = 0 AND plan.slots[n] > 0 THEN
            UPDATE pipeline.join_counters c SET remaining = c.remaining - 1
             WHERE c.execution_id = p_execution AND c.number = plan.headers[n] AND c.slot = 0
            RETURNING c.remaining INTO remaining_;
        END IF;
        IF remaining_ = 0 THEN
            ended := ended OR plan.headers[n] = 0;
            released := released || (SELECT h.bodies FROM pipeline.workflow_headers h
                                      WHERE h.definition_id = x.definition_id AND h.number = plan.headers[n]);
        END IF;
    END LOOP;
    IF ended THEN
        PERFORM pipeline.close_execution(p_execution, 'success');
    END IF;
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
    durable := p_durable OR ended OR released <> '{}' AND NOT kept;
    IF NOT durable THEN
        PERFORM set_config('synchronous_commit', 'off', true);
    END IF;
END $$;

CREATE FUNCTION pipeline.go_on(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_handler text, p_room double precision,
    p_hard_limit interval
) RETURNS pipeline.claimed_task LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(pipeline.lock_key(p_execution)) THEN
        RETURN NULL;
    END IF;
    RETURN pipeline.take_task(p_execution, p_task, p_epoch, p_worker, p_handler, p_room, p_hard_limit);
END $$;

CREATE OR REPLACE FUNCTION pipeline.scatter(p_execution text, p_tasks text[], p_epochs int[], p_grace interval)
RETURNS SETOF pipeline.ready_task LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_try_advisory_xact_lock_shared(pipeline.lock_key(p_execution)) THEN
        RETURN;
    END IF;
    PERFORM 1 FROM pipeline.task_executions t
      WHERE t.execution_id = p_execution AND t.task_id = ANY (p_tasks) ORDER BY t.task_id FOR NO KEY UPDATE;
    RETURN QUERY
        WITH moved AS (
            UPDATE pipeline.task_executions t SET led_by = NULL, hints = t.hints + 1, due_at = pipeline.clock() + p_grace
              FROM unnest(p_tasks, p_epochs) g (task_id, epoch)
             WHERE t.execution_id = p_execution AND t.task_id = g.task_id AND t.epoch = g.epoch
               AND t.status IN ('pending', 'retry') AND t.due_at < 'infinity'
            RETURNING t.task_id, t.epoch, t.handler)
        SELECT p_execution, m.task_id, m.epoch, m.handler, w.timeout, NULL::text, NULL::text
          FROM moved m
          JOIN pipeline.workflow_executions e ON e.execution_id = p_execution
          JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = m.task_id
         ORDER BY w.number;
END $$;

CREATE OR REPLACE FUNCTION pipeline.repeat_of(
    p_execution text, p_definition bigint, p_task text, p_epoch int, p_worker bigint, p_outcome text
) RETURNS TABLE (outcome text, ready pipeline.ready_task[]) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM pipeline.task_executions t
      WHERE t.execution_id = p_execution AND t.task_id = p_task AND t.epoch = p_epoch AND t.worker_id = p_worker
        AND t.status = p_outcome FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'stale', NULL::pipeline.ready_task[];
        RETURN;
    END IF;
    RETURN QUERY
        SELECT 'done', array_agg((t.execution_id, t.task_id, t.epoch, t.handler, w.timeout, t.led_by, NULL)::pipeline.ready_task)
          FROM pipeline.task_executions t
          JOIN pipeline.workflow_tasks w ON w.definition_id = p_definition AND w.task_id = t.task_id
         WHERE t.execution_id = p_execution AND w.waits_for @> ARRAY[p_task]
           AND t.status = 'pending' AND t.due_at IS NOT NULL;
END $$;

CREATE OR REPLACE FUNCTION pipeline.make_ready(p_execution text, p_definition bigint, p_tasks text[], p_grace interval)
RETURNS pipeline.ready_task[] LANGUAGE plpgsql AS $$
DECLARE
    now_ timestamptz := pipeline.clock();
    r record;
    moved record;
    ready pipeline.ready_task[];
BEGIN
    FOR r IN SELECT * FROM pipeline.share(p_definition, p_tasks, true) LOOP  -- in the lock order of released tasks
        UPDATE pipeline.task_executions t
           SET ready_at = now_, due_at = now_ + p_grace, hints = 1, led_by = r.led_by, led_in = NULL
         WHERE t.execution_id = p_execution AND t.task_id = r.task_id AND t.status = 'pending' AND t.due_at IS NULL
        RETURNING t.epoch, t.handler INTO moved;
        IF FOUND THEN
            ready := ready
                || (p_execution, r.task_id, moved.epoch, moved.handler, r.timeout, r.led_by, NULL)::pipeline.ready_task;
        END IF;
    END LOOP;
    RETURN ready;
END $$;

CREATE OR REPLACE FUNCTION pipeline.close_execution(p_execution text, p_status text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    awaited_ boolean;
BEGIN
    UPDATE pipeline.workflow_executions e
       SET status = p_status, finished_at = pipeline.clock(), started_at = coalesce(e.started_at, pipeline.clock()),
           paused = false
     WHERE e.execution_id = p_execution AND e.status IN ('pending', 'running', 'retry') RETURNING e.awaited INTO awaited_;
    IF awaited_ THEN
        PERFORM pg_notify('pipeline_finished', p_execution);
    END IF;
END $$;

CREATE OR REPLACE FUNCTION pipeline.take_due(p_limit int, p_first_only boolean, p_grace interval)
RETURNS SETOF pipeline.ready_task LANGUAGE plpgsql AS $$
DECLARE
    executions text[];
    tasks text[];
    led record;
BEGIN
    SELECT coalesce(array_agg(d.execution_id), '{}'), coalesce(array_agg(d.task_id), '{}') INTO executions, tasks
      FROM (SELECT t.execution_id, t.task_id FROM pipeline.task_executions t
             WHERE t.status IN ('pending', 'retry') AND t.due_at <= pipeline.clock() AND t.led_by IS NULL
               AND (t.hints = 0 OR NOT p_first_only)
             ORDER BY t.due_at LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED) d;
    FOR led IN
        SELECT f.execution_id, f.task_id, f.led_by, f.led_in, f.ready_at FROM pipeline.task_executions f
         WHERE f.status IN ('pending', 'retry') AND f.due_at <= pipeline.clock() AND f.led_by IS NOT NULL
         ORDER BY f.due_at LIMIT 1000 FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        EXIT WHEN cardinality(tasks) >= p_limit;
        IF NOT (SELECT e.paused FROM pipeline.workflow_executions e WHERE e.execution_id = led.execution_id) AND EXISTS (
            SELECT 1 FROM pipeline.task_executions l
             WHERE l.execution_id = coalesce(led.led_in, led.execution_id) AND l.task_id = led.led_by
               AND (l.started_at > pipeline.clock() - interval '2 s' OR l.status = 'pending'
                    AND l.due_at < 'infinity' AND coalesce(l.started_at, '-infinity') < led.ready_at))
        THEN
            UPDATE pipeline.task_executions t SET due_at = pipeline.clock() + p_grace / 4
             WHERE t.execution_id = led.execution_id AND t.task_id = led.task_id;
        ELSE
            executions := executions || led.execution_id;
            tasks := tasks || led.task_id;
        END IF;
    END LOOP;
    RETURN QUERY
        WITH pushed AS (
            UPDATE pipeline.task_executions t
               SET due_at = CASE WHEN e.paused THEN 'infinity'
                                 ELSE pipeline.clock() + p_grace * (2 ^ least(t.hints, 6)) END,
                   hints = CASE WHEN e.paused THEN 0 ELSE t.hints + 1 END, led_by = NULL,
                   ready_at = coalesce(t.ready_at, pipeline.clock())
              FROM (SELECT d.*, x.paused, x.definition_id FROM unnest(executions, tasks) d (execution_id, task_id)
                      JOIN pipeline.workflow_executions x USING (execution_id) OFFSET 0) e  -- one look-up each from here
             WHERE t.execution_id = e.execution_id AND t.task_id = e.task_id
            RETURNING t.execution_id, t.task_id, t.epoch, t.handler, e.definition_id, e.paused)
        SELECT p.execution_id, p.task_id, p.epoch, p.handler, w.timeout, NULL::text, NULL::text
          FROM pushed p JOIN pipeline.workflow_tasks w ON w.definition_id = p.definition_id AND w.task_id = p.task_id
         WHERE NOT p.paused ORDER BY p.execution_id, w.number;
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
    UNION ALL
    SELECT 'may start although its execution is gone', t.execution_id, t.task_id FROM pipeline.task_executions t
     WHERE (t.status IN ('pending', 'retry') AND t.due_at IS NOT NULL OR t.status = 'running')
       AND NOT EXISTS (SELECT 1 FROM pipeline.workflow_executions e WHERE e.execution_id = t.execution_id)
    UNION ALL
    SELECT 'running on a worker that never was', t.execution_id, t.task_id FROM task t
     WHERE t.status = 'running' AND NOT EXISTS (SELECT 1 FROM pipeline.workers k WHERE k.worker_id = t.worker_id)
$$;
