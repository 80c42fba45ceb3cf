-- The bulk of executions in partitions by day, claims that bring all that is declared of their task, and slots for the
-- counters of wide headers (of definitions that are registered from now on).

ALTER TABLE pipeline.workflow_tasks ADD COLUMN params json, ADD COLUMN retry_policy json, ADD COLUMN slots int[];
ALTER TABLE pipeline.workflow_headers ADD COLUMN slots int[] NOT NULL DEFAULT '{}';
ALTER TABLE pipeline.join_counters ADD COLUMN slot int NOT NULL DEFAULT 0;
UPDATE pipeline.workflow_tasks w SET params = t.declared -> 'params', retry_policy = t.declared -> 'retry_policy'
  FROM (SELECT d.definition_id, e.value AS declared
          FROM pipeline.workflow_definitions d, json_array_elements(d.definition -> 'tasks') e) t
 WHERE t.definition_id = w.definition_id AND t.declared ->> 'id' = w.task_id
   AND (t.declared -> 'params' IS NOT NULL OR t.declared -> 'retry_policy' IS NOT NULL);

ALTER TABLE pipeline.workflow_executions ADD COLUMN forgotten boolean NOT NULL DEFAULT false;

CREATE TABLE pipeline.partitions (
    first_day  int PRIMARY KEY,            -- since 1970
    last_day   int NOT NULL
);
ALTER TABLE pipeline.workflow_states RENAME TO workflow_states_default;
ALTER INDEX pipeline.workflow_states_pkey RENAME TO workflow_states_default_pkey;
CREATE TABLE pipeline.workflow_states (LIKE pipeline.workflow_states_default INCLUDING ALL EXCLUDING INDEXES)
    PARTITION BY RANGE (execution_id);
ALTER TABLE pipeline.workflow_states ADD PRIMARY KEY (execution_id);
ALTER TABLE pipeline.workflow_states ATTACH PARTITION pipeline.workflow_states_default DEFAULT;

ALTER TABLE pipeline.task_executions RENAME TO task_executions_default;
ALTER INDEX pipeline.task_executions_pkey RENAME TO task_executions_default_pkey;
ALTER INDEX pipeline.task_executions_due RENAME TO task_executions_default_due_at_idx;
ALTER INDEX pipeline.task_executions_running RENAME TO task_executions_default_worker_id_idx;
CREATE TABLE pipeline.task_executions (LIKE pipeline.task_executions_default INCLUDING ALL EXCLUDING INDEXES)
    PARTITION BY RANGE (execution_id);
ALTER TABLE pipeline.task_executions ADD PRIMARY KEY (execution_id, task_id);
CREATE INDEX task_executions_due ON pipeline.task_executions (due_at)
    WHERE status IN ('pending', 'retry') AND due_at IS NOT NULL;
CREATE INDEX task_executions_running ON pipeline.task_executions (worker_id) WHERE status = 'running';
ALTER TABLE pipeline.task_executions ATTACH PARTITION pipeline.task_executions_default DEFAULT;

ALTER TABLE pipeline.task_attempts RENAME TO task_attempts_default;
ALTER INDEX pipeline.task_attempts_pkey RENAME TO task_attempts_default_pkey;
CREATE TABLE pipeline.task_attempts (LIKE pipeline.task_attempts_default INCLUDING ALL EXCLUDING INDEXES)
    PARTITION BY RANGE (execution_id);
ALTER TABLE pipeline.task_attempts ADD PRIMARY KEY (execution_id, task_id, epoch);
ALTER TABLE pipeline.task_attempts ATTACH PARTITION pipeline.task_attempts_default DEFAULT;

ALTER TABLE pipeline.join_counters RENAME TO join_counters_default;
ALTER TABLE pipeline.join_counters_default DROP CONSTRAINT join_counters_pkey,
    ADD CONSTRAINT join_counters_default_pkey PRIMARY KEY (execution_id, number, slot);
CREATE TABLE pipeline.join_counters (LIKE pipeline.join_counters_default INCLUDING ALL EXCLUDING INDEXES)
    PARTITION BY RANGE (execution_id);
ALTER TABLE pipeline.join_counters ADD PRIMARY KEY (execution_id, number, slot);
ALTER TABLE pipeline.join_counters ATTACH PARTITION pipeline.join_counters_default DEFAULT;

-- Who could read the tables, and so on, still can.
DO $$ DECLARE
    granted record;
BEGIN
    FOR granted IN
        SELECT replace(c.relname, '_default', '') AS whole, a.privilege_type, a.is_grantable,
               CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS grantee
          FROM pg_class c, aclexplode(c.relacl) a
         WHERE c.relnamespace = 'pipeline'::regnamespace AND a.grantee <> c.relowner AND c.relname IN (
               'workflow_states_default', 'task_executions_default', 'task_attempts_default', 'join_counters_default') LOOP
        EXECUTE format('GRANT %s ON pipeline.%I TO %s %s', granted.privilege_type, granted.whole, granted.grantee,
                       CASE WHEN granted.is_grantable THEN 'WITH GRANT OPTION' END);
    END LOOP;
END $$;

DROP FUNCTION pipeline.share(bigint, text[]);
DROP FUNCTION pipeline.start_task(text, bigint, text, int, bigint, text, double precision, interval);
DROP FUNCTION pipeline.claim_task(text, text, int, bigint, text, interval);
DROP FUNCTION pipeline.complete_task(
    text, text, int, bigint, jsonb, interval, double precision, text, int, text, interval);
DROP TYPE pipeline.claimed_task;
-- A task that was just claimed, as its worker needs it; with the results of its dependencies where they are few and small.
CREATE TYPE pipeline.claimed_task AS (
    task_id text, handler text, epoch int, attempt int, retries int, params json, results jsonb,
    timeout double precision, dependencies text[], retry_policy json);

-- Tasks that become ready together, in topological order, and which of them share a message: the first of each leads, the
-- others are led by it. There are as many messages as processes that could run them, and no more than one for four tasks of
-- a handler that is known to be quick. Each holds tasks of one handler and timeout, and no more than its size allows (as
-- dispatch counts it). Slow handlers have a message for each task.
-- Nobody joins this to other tables: Postgres takes plans for small, and then compares each task with each.
CREATE FUNCTION pipeline.share(p_definition bigint, p_tasks text[], p_together boolean)
RETURNS TABLE (task_id text, number int, handler text, timeout double precision, led_by text) LANGUAGE plpgsql STABLE AS $$
DECLARE
    each_ int := 1;
    slow_ text[];
    quick_ text[] := '{}';
BEGIN
    IF p_together AND cardinality(p_tasks) > 1 THEN
        SELECT ceil(cardinality(p_tasks)::float8 / greatest(count(*), 1)),
               ARRAY(SELECT DISTINCT unnest(k.slow) FROM pipeline.workers k WHERE k.expires_at > pipeline.clock()),
               ARRAY(SELECT DISTINCT unnest(k.quick) FROM pipeline.workers k WHERE k.expires_at > pipeline.clock())
          INTO each_, slow_, quick_ FROM pipeline.workers k WHERE k.expires_at > pipeline.clock();
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

-- Record an execution of a stored definition with all its tasks and counters, and return those that are ready. One
-- transaction with whatever the caller's connection has open. `created` is false where the idempotency key was used before;
-- no row where the id belongs to another execution.
CREATE OR REPLACE FUNCTION pipeline.create_execution(
    p_execution text, p_definition bigint, p_user text, p_key text, p_input jsonb, p_input_digest text,
    p_variables jsonb, p_deadline interval, p_queue_timeout interval, p_grace interval
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
        INSERT INTO pipeline.task_executions (execution_id, task_id, handler, ready_at, due_at, hints, led_by)
        SELECT p_execution, f.task_id, f.handler, now_, now_ + p_grace, (p_grace > '0')::int, f.led_by FROM first f)
    SELECT array_agg((p_execution, f.task_id, 0, f.handler, f.timeout, f.led_by)::pipeline.ready_task ORDER BY f.number)
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

-- Where the tasks of a plan are counted.
CREATE FUNCTION pipeline.places_of(p_definition bigint) RETURNS TABLE (task_id text, number int, slot int) LANGUAGE sql STABLE AS
$$ SELECT w.task_id, n.number, coalesce(w.slots[n.place], 0)
     FROM pipeline.workflow_tasks w, unnest(w.headers) WITH ORDINALITY n (number, place)
    WHERE w.definition_id = p_definition $$;

-- What the counters of an execution should be, by the rows of its tasks, where these states count as done.
CREATE FUNCTION pipeline.open_places(p_execution text, p_definition bigint, p_done text[])
RETURNS TABLE (number int, slot int, remaining bigint) LANGUAGE sql STABLE AS $$
    WITH open AS (
        SELECT p.number, p.slot, count(*) FILTER (WHERE t.status <> ALL (p_done)) AS remaining
          FROM pipeline.places_of(p_definition) p
          JOIN pipeline.task_executions t ON t.execution_id = p_execution AND t.task_id = p.task_id GROUP BY 1, 2)
    SELECT * FROM open
    UNION ALL
    SELECT o.number, 0, count(*) FILTER (WHERE o.remaining > 0) FROM open o WHERE o.slot > 0 GROUP BY 1
$$;

-- Give a task of an open execution to a worker's incarnation, or return NULL. With p_epoch, one whose message says so;
-- without, one that its predecessor has just released. The caller holds the execution's lock.
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
    RETURNING t.task_id, t.handler, t.epoch, t.attempt, t.retries,
              coalesce(t.params::json, w.params),
              CASE WHEN cardinality(w.dependencies) BETWEEN 1 AND 16 THEN (
                  SELECT CASE WHEN coalesce(sum(CASE WHEN pg_column_size(r.result) > 8192 THEN 8193  -- compressed
                                                     ELSE octet_length(r.result::text) END), 0) <= 8192
                              THEN jsonb_object_agg(r.task_id, r.result) END
                    FROM pipeline.task_executions r
                   WHERE r.execution_id = p_execution AND r.task_id = ANY (w.dependencies)) END,
              w.timeout, w.dependencies, w.retry_policy
         INTO started;
    RETURN started;
END $$;

-- Give the task to a worker's incarnation, or return no row: the message was stale, doubled or forged, or the
-- execution takes no claims. A repeat of a claim whose answer was lost gives the same row again.
CREATE FUNCTION pipeline.claim_task(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_handler text, p_hard_limit interval
) RETURNS SETOF pipeline.claimed_task LANGUAGE plpgsql AS $$
DECLARE
    x record;
    started pipeline.claimed_task;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);  -- a forgotten claim is only a second attempt
    PERFORM pg_advisory_xact_lock_shared(pipeline.lock_key(p_execution));
    SELECT e.definition_id, e.status, e.verdict, e.paused INTO x
      FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    IF NOT FOUND OR x.paused OR x.verdict IS NOT NULL OR x.status NOT IN ('pending', 'running', 'retry') THEN
        RETURN;
    END IF;
    started := pipeline.start_task(
        p_execution, x.definition_id, p_task, p_epoch, p_worker, p_handler, 'infinity', p_hard_limit);
    IF started.task_id IS NULL THEN
        RETURN QUERY SELECT t.task_id, t.handler, t.epoch, t.attempt, t.retries, coalesce(t.params::json, w.params),
                            NULL::jsonb, w.timeout, w.dependencies, w.retry_policy
            FROM pipeline.task_executions t
            JOIN pipeline.workflow_tasks w ON w.definition_id = x.definition_id AND w.task_id = t.task_id
            WHERE t.execution_id = p_execution AND t.task_id = p_task AND t.epoch = p_epoch + 1
              AND t.handler = p_handler AND t.status = 'running' AND t.worker_id = p_worker;
        RETURN;
    END IF;
    IF x.status IN ('pending', 'retry') THEN
        UPDATE pipeline.workflow_executions e
           SET status = 'running', started_at = coalesce(e.started_at, pipeline.clock())
         WHERE e.execution_id = p_execution AND e.status IN ('pending', 'retry');
    END IF;
    RETURN NEXT started;
END $$;

-- Record a success and return what it released. The straight path: outcome is `done`; `stale` where the fence does
-- not hold; `again` where the execution needs the careful path (end_task) and nothing was changed.
-- With p_room, the longest timeout that may follow, the worker goes on at once: `next` is claimed for it, the first task
-- that was released or, where none was, p_next with the epoch and handler of the message that named it.
CREATE FUNCTION pipeline.complete_task(
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
        IF cardinality(released) = 1 AND p_room > 0 AND NOT x.paused THEN
            next := pipeline.start_task(
                p_execution, x.definition_id, released[1], NULL, p_worker, NULL, p_room, p_hard_limit);
        END IF;
        IF next.task_id IS NULL THEN
            ready := pipeline.make_ready(p_execution, x.definition_id, released, p_grace);
            IF cardinality(released) > 1 AND p_room > 0 AND NOT x.paused THEN
                next := pipeline.start_task(
                    p_execution, x.definition_id, ready[1].task_id, ready[1].epoch, p_worker, NULL, p_room, p_hard_limit);
            END IF;
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

-- Mark tasks as ready for a claim and return them for publishing. One after the other by their keys: of one statement for
-- all, Postgres makes a plan that compares each with each where it takes executions for small.
CREATE OR REPLACE FUNCTION pipeline.make_ready(p_execution text, p_definition bigint, p_tasks text[], p_grace interval)
RETURNS pipeline.ready_task[] LANGUAGE plpgsql AS $$
DECLARE
    now_ timestamptz := pipeline.clock();
    r record;
    moved record;
    ready pipeline.ready_task[];
BEGIN
    FOR r IN SELECT * FROM pipeline.share(p_definition, p_tasks, true) LOOP  -- in the lock order of released tasks
        UPDATE pipeline.task_executions t SET ready_at = now_, due_at = now_ + p_grace, hints = 1, led_by = r.led_by
         WHERE t.execution_id = p_execution AND t.task_id = r.task_id AND t.status = 'pending' AND t.due_at IS NULL
        RETURNING t.epoch, t.handler INTO moved;
        IF FOUND THEN
            ready := ready || (p_execution, r.task_id, moved.epoch, moved.handler, r.timeout, r.led_by)::pipeline.ready_task;
        END IF;
    END LOOP;
    RETURN ready;
END $$;

-- Release what waited for a task that ended well or was skipped, wave by wave. A task with a skipped dependency is
-- skipped when its turn comes, and releases in turn; so does, uncounted, one that succeeded in an earlier run behind a
-- task that was skipped then. The caller holds the execution's lock exclusively.
CREATE OR REPLACE FUNCTION pipeline.release(p_execution text, p_definition bigint, p_task text, p_grace interval)
RETURNS pipeline.ready_task[] LANGUAGE plpgsql AS $$
DECLARE
    ended text[] := ARRAY[p_task];
    passed text[] := '{}';
    zero int[];
    candidates text[];
    barred text[];
    causes text[];
    runnable text[] := '{}';
    over boolean := false;
BEGIN
    WHILE ended || passed <> '{}' LOOP
        WITH hit AS MATERIALIZED (
            SELECT p.number, p.slot, count(*) AS times FROM pipeline.places_of(p_definition) p
             WHERE p.task_id = ANY (ended) GROUP BY 1, 2
        ), counted AS (
            UPDATE pipeline.join_counters c SET remaining = c.remaining - h.times FROM hit h
             WHERE c.execution_id = p_execution AND c.number = h.number AND c.slot = h.slot
            RETURNING c.number, c.slot, c.remaining
        ), slots AS (  -- other rows: where there are slots, no task is counted in slot 0
            UPDATE pipeline.join_counters c SET remaining = c.remaining - d.times
              FROM (SELECT o.number, count(*) AS times FROM counted o WHERE o.slot > 0 AND o.remaining = 0 GROUP BY 1) d
             WHERE c.execution_id = p_execution AND c.number = d.number AND c.slot = 0
            RETURNING c.number, c.slot, c.remaining)
        SELECT coalesce(array_agg(c.number), '{}') INTO zero
          FROM (SELECT * FROM counted UNION ALL SELECT * FROM slots) c WHERE c.slot = 0 AND c.remaining = 0;
        over := over OR 0 = ANY (zero) OR EXISTS (
            SELECT 1 FROM pipeline.workflow_tasks w
             WHERE w.definition_id = p_definition AND w.task_id = ANY (passed) AND 0 = ANY (w.headers));
        candidates := ARRAY(
            SELECT r FROM pipeline.workflow_tasks w, unnest(w.releases) r
             WHERE w.definition_id = p_definition AND w.task_id = ANY (ended || passed)
            UNION ALL
            SELECT b FROM pipeline.workflow_headers h, unnest(h.bodies) b
             WHERE h.definition_id = p_definition AND h.number = ANY (zero));
        SELECT array_agg(b.task_id), array_agg(b.because) INTO barred, causes
          FROM (SELECT w.task_id, min(s.task_id) AS because
                  FROM pipeline.workflow_tasks w, unnest(w.dependencies) n, LATERAL (
                    SELECT d.task_id FROM pipeline.task_executions d
                     WHERE d.execution_id = p_execution AND d.task_id = n AND d.status = 'skipped'
                    OFFSET 0) s  -- one look-up each, whatever the planner thinks of the size of executions
                 WHERE w.definition_id = p_definition AND w.task_id = ANY (candidates) GROUP BY w.task_id) b;
        WITH moved AS (
            UPDATE pipeline.task_executions t
               SET status = 'skipped', finished_at = pipeline.clock(),
                   error_message = format('dependency %s was skipped', causes[array_position(barred, t.task_id)])
             WHERE t.execution_id = p_execution AND t.task_id = ANY (barred) AND t.status = 'pending'
            RETURNING t.task_id)
        SELECT coalesce(array_agg(m.task_id), '{}') INTO ended FROM moved m;
        SELECT coalesce(array_agg(t.task_id) FILTER (WHERE t.status = 'success'), '{}'),
               runnable || coalesce(array_agg(t.task_id) FILTER (WHERE t.status = 'pending'), '{}')
          INTO passed, runnable
          FROM pipeline.task_executions t WHERE t.execution_id = p_execution AND t.task_id = ANY (candidates);
    END LOOP;
    IF over THEN
        PERFORM pipeline.close_execution(p_execution, 'success');
    END IF;
    RETURN pipeline.make_ready(p_execution, p_definition, runnable, p_grace);
END $$;

-- Tasks whose message is due, pushed ahead so that the next look is later each time; what is paused is parked instead.
-- The second statement sees what was committed before the first had its locks: a pause or resume is never missed.
-- With `p_first_only`, tasks that were published before are left to the messages that the broker still holds. A task that
-- shares a message is left to it until that message's first task was claimed a while ago, or is otherwise gone.
CREATE OR REPLACE FUNCTION pipeline.take_due(p_limit int, p_first_only boolean, p_grace interval)
RETURNS SETOF pipeline.ready_task LANGUAGE plpgsql AS $$
DECLARE
    executions text[];
    tasks text[];
BEGIN
    SELECT coalesce(array_agg(d.execution_id), '{}'), coalesce(array_agg(d.task_id), '{}') INTO executions, tasks
      FROM (SELECT t.execution_id, t.task_id FROM pipeline.task_executions t
             WHERE t.status IN ('pending', 'retry') AND t.due_at <= pipeline.clock() AND t.led_by IS NULL
               AND (t.hints = 0 OR NOT p_first_only)
             ORDER BY t.due_at LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED) d;
    SELECT executions || coalesce(array_agg(d.execution_id), '{}'), tasks || coalesce(array_agg(d.task_id), '{}')
      INTO executions, tasks
      FROM (SELECT t.*
              FROM (SELECT f.execution_id, f.task_id FROM pipeline.task_executions f
                     WHERE f.status IN ('pending', 'retry') AND f.due_at <= pipeline.clock() AND f.led_by IS NOT NULL
                     ORDER BY f.due_at LIMIT 1000) oldest,  -- the others' turn comes
                   LATERAL (
                    SELECT t.execution_id, t.task_id FROM pipeline.task_executions t
                      JOIN pipeline.workflow_executions e USING (execution_id)
                     WHERE t.execution_id = oldest.execution_id AND t.task_id = oldest.task_id
                       AND t.led_by IS NOT NULL AND (e.paused OR NOT EXISTS (
                           SELECT 1 FROM pipeline.task_executions l
                            WHERE l.execution_id = t.execution_id AND l.task_id = t.led_by
                              AND (l.started_at > pipeline.clock() - interval '2 s' OR l.status = 'pending'
                                   AND l.due_at IS NOT NULL AND coalesce(l.started_at, '-infinity') < t.ready_at)))
                       FOR NO KEY UPDATE OF t SKIP LOCKED) t
             LIMIT p_limit - cardinality(tasks)) d;
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
        SELECT p.execution_id, p.task_id, p.epoch, p.handler, w.timeout, NULL::text
          FROM pushed p JOIN pipeline.workflow_tasks w ON w.definition_id = p.definition_id AND w.task_id = p.task_id
         WHERE NOT p.paused ORDER BY p.execution_id, w.number;
END $$;

-- Open an ended execution again. With p_from NULL, from what did not succeed (a failed or cancelled one); else from that
-- task with everything downstream of it, and what did not succeed besides. What else succeeded is kept.
-- Counters are computed from the rows, never patched. Where tasks run one after another, some may have succeeded behind
-- one that starts afresh: then only the first open task may start, and completions pass over what succeeded.
CREATE OR REPLACE FUNCTION pipeline.reopen_execution(p_execution text, p_user text, p_from text, p_params jsonb)
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    x record;
    reset text[];
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
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

-- Decide a task by hand, once its turn has come: success or skipped, whatever it is doing. Where the execution has
-- failed or was cancelled it is opened again first. An attempt that runs loses its fence. Returns the status found, NULL
-- where there is no such task, `waiting` where it waits for others.
CREATE OR REPLACE FUNCTION pipeline.mark_task(
    p_execution text, p_task text, p_status text, p_result jsonb, p_user text, p_reason text, p_grace interval
) RETURNS TABLE (status text, changed boolean, ready pipeline.ready_task[]) LANGUAGE plpgsql AS $$
DECLARE
    x record;
    found_ text;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
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

-- What the ids of executions begin with that were created on a day (since 1970).
CREATE FUNCTION pipeline.ids_from(p_day int) RETURNS text LANGUAGE sql IMMUTABLE AS
$$ SELECT 'exec-' || lpad(to_hex(p_day), 4, '0') $$;

CREATE FUNCTION pipeline.today() RETURNS int LANGUAGE sql STABLE AS
$$ SELECT floor(extract(epoch FROM pipeline.clock()) / 86400)::int $$;

-- See to it that the executions of the next p_days days have partitions, of so many days each; returns how many were made.
-- Whoever is in the way for longer than a moment is left alone: then the next look makes them. None is made where the role
-- may not, nor where the default partitions are large: to attach another, Postgres reads them from end to end, and nobody
-- else does anything meanwhile.
CREATE FUNCTION pipeline.make_partitions(p_days int, p_most_bytes bigint) RETURNS int LANGUAGE plpgsql SET lock_timeout = '500ms' AS $$
DECLARE
    first_ int;
    name_ text;
    whole text;
    made int := 0;
BEGIN
    LOCK TABLE pipeline.partitions IN SHARE ROW EXCLUSIVE MODE;
    SELECT greatest(pipeline.today() + 1, max(p.last_day) + 1) INTO first_ FROM pipeline.partitions p;
    IF pg_relation_size('pipeline.task_executions_default') > p_most_bytes THEN
        RETURN 0;
    END IF;
    WHILE first_ <= pipeline.today() + p_days LOOP
        LOCK TABLE ONLY pipeline.workflow_states_default, pipeline.task_executions_default, pipeline.task_attempts_default,
            pipeline.join_counters_default IN ACCESS EXCLUSIVE MODE;
        FOREACH whole IN ARRAY ARRAY['workflow_states', 'task_executions', 'task_attempts', 'join_counters'] LOOP
            name_ := format('%s_%s', whole, to_hex(first_));
            EXECUTE format('CREATE TABLE pipeline.%I (LIKE pipeline.%I INCLUDING ALL) %s', name_, whole, (
                SELECT 'WITH (' || array_to_string(c.reloptions, ',') || ')' FROM pg_class c
                 WHERE c.oid = format('pipeline.%I', whole || '_default')::regclass));
            EXECUTE format($move$  -- ids that do not begin with a day may lie here, and those of clocks that are fast
                WITH moved AS (DELETE FROM pipeline.%I WHERE execution_id >= %L AND execution_id < %L RETURNING *)
                INSERT INTO pipeline.%I SELECT * FROM moved $move$,
                whole || '_default', pipeline.ids_from(first_), pipeline.ids_from(first_ + p_days), name_);
            EXECUTE format('ALTER TABLE pipeline.%I ATTACH PARTITION pipeline.%I FOR VALUES FROM (%L) TO (%L)',
                whole, name_, pipeline.ids_from(first_), pipeline.ids_from(first_ + p_days));
        END LOOP;
        INSERT INTO pipeline.partitions (first_day, last_day) VALUES (first_, first_ + p_days - 1);
        first_ := first_ + p_days;
        made := made + 1;
    END LOOP;
    RETURN made;
EXCEPTION WHEN lock_not_available OR deadlock_detected OR insufficient_privilege THEN
    RETURN 0;
END $$;

-- Drop the partitions of days that have been over for two and of which every execution is forgotten; returns how many.
CREATE FUNCTION pipeline.drop_partitions() RETURNS int LANGUAGE plpgsql SET lock_timeout = '500ms' AS $$
DECLARE
    old record;
    dropped int := 0;
BEGIN
    FOR old IN SELECT p.* FROM pipeline.partitions p WHERE p.last_day < pipeline.today() - 1 ORDER BY 1 FOR UPDATE LOOP
        CONTINUE WHEN pipeline.in_use(old.first_day, old.last_day);
        LOCK TABLE ONLY pipeline.workflow_states, pipeline.task_executions, pipeline.task_attempts, pipeline.join_counters
            IN ACCESS EXCLUSIVE MODE;
        CONTINUE WHEN pipeline.in_use(old.first_day, old.last_day);  -- by somebody whose clock is late
        EXECUTE format('DROP TABLE pipeline.workflow_states_%1$s, pipeline.task_executions_%1$s, '
                       'pipeline.task_attempts_%1$s, pipeline.join_counters_%1$s', to_hex(old.first_day));
        DELETE FROM pipeline.partitions p WHERE p.first_day = old.first_day;
        dropped := dropped + 1;
    END LOOP;
    RETURN dropped;
EXCEPTION WHEN lock_not_available OR deadlock_detected OR insufficient_privilege THEN
    RETURN 0;
END $$;

CREATE FUNCTION pipeline.in_use(p_first int, p_last int) RETURNS boolean LANGUAGE sql VOLATILE AS
$$ SELECT EXISTS (SELECT 1 FROM pipeline.workflow_executions e
                   WHERE e.execution_id >= pipeline.ids_from(p_first) AND e.execution_id < pipeline.ids_from(p_last + 1)) $$;

-- From here on nobody opens an execution again, so that its artifacts may be deleted; false where it has not ended.
CREATE FUNCTION pipeline.close_for_good(p_execution text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    UPDATE pipeline.workflow_executions e SET forgotten = true
     WHERE e.execution_id = p_execution AND e.status IN ('success', 'failed', 'cancelled');
    RETURN FOUND;
END $$;

-- Delete ended executions with all that belongs to them; the caller has dealt with their artifacts. What lies in a
-- partition of its days stays there, unseen, until that is dropped.
CREATE OR REPLACE FUNCTION pipeline.forget_executions(p_executions text[]) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    gone text[];
    lying text[];
BEGIN
    PERFORM pg_advisory_xact_lock(k) FROM (SELECT DISTINCT pipeline.lock_key(g) AS k FROM unnest(p_executions) g ORDER BY 1) l;
    WITH deleted AS (
        DELETE FROM pipeline.workflow_executions e
         WHERE e.execution_id = ANY (p_executions) AND e.status IN ('success', 'failed', 'cancelled')
        RETURNING e.execution_id)
    SELECT coalesce(array_agg(d.execution_id), '{}') INTO gone FROM deleted d;
    DELETE FROM pipeline.workflow_events t WHERE t.execution_id = ANY (gone);
    lying := ARRAY(SELECT g FROM unnest(gone) g WHERE NOT EXISTS (
        SELECT 1 FROM pipeline.partitions p
         WHERE g COLLATE "C" >= pipeline.ids_from(p.first_day) AND g COLLATE "C" < pipeline.ids_from(p.last_day + 1)));
    DELETE FROM pipeline.task_executions t WHERE t.execution_id = ANY (lying);
    DELETE FROM pipeline.task_attempts t WHERE t.execution_id = ANY (lying);
    DELETE FROM pipeline.join_counters t WHERE t.execution_id = ANY (lying);
    DELETE FROM pipeline.workflow_states t WHERE t.execution_id = ANY (lying);
    RETURN cardinality(gone);
END $$;

-- Every violated invariant; empty where all is well.
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
      FROM pipeline.workflow_executions e,
           LATERAL pipeline.open_places(e.execution_id, e.definition_id, '{success,skipped}') o
     WHERE e.verdict IS NULL AND e.status IN ('pending', 'running', 'retry')
       AND NOT EXISTS (SELECT 1 FROM pipeline.join_counters c
                        WHERE c.execution_id = e.execution_id AND c.number = o.number AND c.slot = o.slot
                          AND c.remaining = o.remaining)
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
