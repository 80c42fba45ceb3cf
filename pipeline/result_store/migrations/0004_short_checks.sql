-- Short CHECKs; an index of what runs that the end of an attempt cannot be tempted to use; fewer steps to release tasks.

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

CREATE OR REPLACE FUNCTION pipeline.share(p_definition bigint, p_tasks text[], p_together boolean)
RETURNS TABLE (task_id text, number int, handler text, timeout double precision, led_by text) LANGUAGE plpgsql STABLE AS $$
DECLARE
    processes int := 0;
    each_ int := 1;
    slow_ text[] := '{}';
    quick_ text[] := '{}';
    known record;
BEGIN
    IF p_together AND cardinality(p_tasks) > 1 THEN
        FOR known IN SELECT k.slow, k.quick FROM pipeline.workers k WHERE k.expires_at > pipeline.clock() LOOP
            processes := processes + 1;
            IF NOT known.slow <@ slow_ THEN
                slow_ := slow_ || known.slow;
            END IF;
            IF NOT known.quick <@ quick_ THEN
                quick_ := quick_ || known.quick;
            END IF;
        END LOOP;
        each_ := ceil(cardinality(p_tasks)::float8 / greatest(processes, 1));
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

CREATE OR REPLACE FUNCTION pipeline.complete_task(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_result jsonb, p_grace interval,
    p_room double precision, p_next text, p_next_epoch int, p_handler text, p_hard_limit interval,
    OUT outcome text, OUT ready pipeline.ready_task[], OUT next pipeline.claimed_task
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
    outcome := 'done';
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
            SELECT t.task_id, t.handler, t.epoch, t.attempt, t.retries, coalesce(t.params::json, w.params), NULL,
                   w.timeout, w.dependencies, w.retry_policy INTO next
              FROM pipeline.task_executions t
              JOIN pipeline.workflow_tasks w ON w.definition_id = x.definition_id AND w.task_id = t.task_id
             WHERE t.execution_id = p_execution AND t.status = 'running' AND t.worker_id = p_worker
               AND (w.waits_for @> ARRAY[p_task] OR t.task_id = p_next AND t.epoch = p_next_epoch + 1) LIMIT 1;
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
    IF released <> '{}' THEN
        IF p_room > 0 AND NOT x.paused THEN
            next := pipeline.start_task(
                p_execution, x.definition_id, released[1], NULL, p_worker, NULL, p_room, p_hard_limit);
        END IF;
        IF next.task_id IS NULL OR cardinality(released) > 1 THEN
            ready := pipeline.make_ready(p_execution, x.definition_id, released, p_grace);
        END IF;
    ELSIF ended THEN
        PERFORM pipeline.close_execution(p_execution, 'success');
    ELSE
        PERFORM set_config('synchronous_commit', 'off', true);
        IF p_next IS NOT NULL AND p_room > 0 AND NOT x.paused THEN
            next := pipeline.start_task(
                p_execution, x.definition_id, p_next, p_next_epoch, p_worker, p_handler, p_room, p_hard_limit);
        END IF;
    END IF;
END $$;
