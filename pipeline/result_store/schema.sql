-- The result store: Postgres is the truth, a Celery message is a hint.
--
-- A definition is stored once, together with its compiled plan (workflow_tasks, workflow_headers). An execution is a
-- copy of the plan's moving parts: one row per task (task_executions) and one counter per header (join_counters).
--
-- due_at is the whole hint protocol. NULL: dependencies open, or claimed, or over. A time: the task may be claimed;
-- when the time passes, recovery publishes its message (again). Submitting and completing set it a grace ahead and
-- publish themselves; a retry sets it to the end of its delay.
--
-- A claim raises the epoch and writes the worker's incarnation: (epoch, worker_id) is the fence, what does not hold it
-- changes nothing. An attempt that ended otherwise than the task did is kept in task_attempts.
--
-- Locks. Whoever moves one task along the straight path (claim, success) holds the execution's advisory lock shared;
-- whoever changes the execution as a whole (failure, skip, retry, loss, cancel, pause, resume, retry of the execution)
-- holds it exclusively and then needs no care for rivals. On the straight path rows are locked in one order: own task,
-- counters by number, released tasks, the execution last.
--
-- Straight-path commits that release nothing may be asynchronous: WAL is sequential, so the commit that releases a
-- successor makes all earlier ones durable before anything is published.

CREATE SCHEMA pipeline;

-- Tests set the clock: SET pipeline.fake_now = '2026-01-01 00:00:00+00'.
CREATE FUNCTION pipeline.clock() RETURNS timestamptz LANGUAGE sql STABLE AS
$$ SELECT coalesce(nullif(current_setting('pipeline.fake_now', true), '')::timestamptz, clock_timestamp()) $$;

CREATE TABLE pipeline.schema_versions (
    version     int PRIMARY KEY,
    name        text NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE pipeline.workflow_definitions (
    definition_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workflow_id    text COLLATE "C" NOT NULL,
    version        text COLLATE "C" NOT NULL,
    digest         text NOT NULL,
    definition     json NOT NULL,          -- json, not jsonb: the text is what the digest was made of
    registered_at  timestamptz NOT NULL DEFAULT pipeline.clock(),
    CONSTRAINT workflow_definitions_version UNIQUE (workflow_id, version)
);

-- The compiled plan of a definition; never changed.
CREATE TABLE pipeline.workflow_tasks (
    definition_id  bigint NOT NULL,
    task_id        text COLLATE "C" NOT NULL,
    number         int NOT NULL,           -- place in topological order
    handler        text NOT NULL,
    timeout        double precision NOT NULL,
    dependencies   text[] NOT NULL,        -- as declared: whose results it takes
    waits_for      text[] NOT NULL,        -- as run: differs where tasks run one after another
    releases       text[] NOT NULL,        -- tasks that wait for this one alone
    headers        int[] NOT NULL,         -- headers that this task stands in
    PRIMARY KEY (definition_id, task_id)
);

CREATE TABLE pipeline.workflow_headers (
    definition_id  bigint NOT NULL,
    number         int NOT NULL,           -- 0: the end of the workflow
    tasks          text[] NOT NULL,
    bodies         text[] NOT NULL,        -- tasks that start when all of the header succeeded
    PRIMARY KEY (definition_id, number)
);

CREATE TABLE pipeline.workflow_executions (
    execution_id     text COLLATE "C" PRIMARY KEY,
    definition_id    bigint NOT NULL,
    workflow_id      text COLLATE "C" NOT NULL,
    status           text NOT NULL DEFAULT 'pending',
    verdict          text,                 -- decided while running tasks still end; no claim from then on
    paused           boolean NOT NULL DEFAULT false,
    has_skips        boolean NOT NULL DEFAULT false,  -- completions must look for skipped dependencies
    run              int NOT NULL DEFAULT 1,          -- +1 with each retry of the execution
    created_by       text,
    idempotency_key  text,
    input_digest     text NOT NULL,
    error_message    text,
    created_at       timestamptz NOT NULL DEFAULT pipeline.clock(),
    started_at       timestamptz,
    finished_at      timestamptz,
    deadline_at      timestamptz,
    CONSTRAINT workflow_executions_status
        CHECK (status IN ('pending', 'running', 'success', 'failed', 'cancelled', 'retry')),
    CONSTRAINT workflow_executions_verdict CHECK (verdict IN ('failed', 'cancelled')),
    CONSTRAINT workflow_executions_finished
        CHECK ((finished_at IS NOT NULL) = (status IN ('success', 'failed', 'cancelled')))
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX workflow_executions_key ON pipeline.workflow_executions (workflow_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX workflow_executions_created ON pipeline.workflow_executions (created_at);
CREATE INDEX workflow_executions_deadline ON pipeline.workflow_executions (deadline_at)
    WHERE deadline_at IS NOT NULL AND finished_at IS NULL;

CREATE TABLE pipeline.workflow_states (
    execution_id  text COLLATE "C" PRIMARY KEY,
    variables     jsonb NOT NULL,
    input_data    jsonb NOT NULL
);

CREATE TABLE pipeline.task_executions (
    execution_id      text COLLATE "C" NOT NULL,
    task_id           text COLLATE "C" NOT NULL,
    handler           text NOT NULL,
    status            text NOT NULL DEFAULT 'pending',
    epoch             int NOT NULL DEFAULT 0,       -- +1 with every claim and every reset; never goes back
    attempt           int NOT NULL DEFAULT 0,       -- times that it was claimed
    retries           int NOT NULL DEFAULT 0,       -- of the retry policy's budget, in this run
    losses            int NOT NULL DEFAULT 0,       -- of the budget for lost workers, in this run
    hints             int NOT NULL DEFAULT 0,       -- messages published since it became due
    due_at            timestamptz,
    ready_at          timestamptz,
    worker_id         bigint,                       -- incarnation that claimed it last
    started_at        timestamptz,
    deadline_at       timestamptz,                  -- when even the hard limit has passed
    finished_at       timestamptz,
    progress          real,
    progress_message  text,
    result            jsonb,
    error_type        text,
    error_message     text,                         -- of a skipped task: why
    error_traceback   text,
    PRIMARY KEY (execution_id, task_id),
    CONSTRAINT task_executions_status
        CHECK (status IN ('pending', 'running', 'retry', 'success', 'failed', 'skipped', 'cancelled')),
    CONSTRAINT task_executions_running CHECK (status <> 'running' OR (worker_id IS NOT NULL AND due_at IS NULL)),
    CONSTRAINT task_executions_finished
        CHECK ((finished_at IS NOT NULL) = (status IN ('success', 'failed', 'skipped', 'cancelled')))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);
CREATE INDEX task_executions_due ON pipeline.task_executions (due_at)
    WHERE status IN ('pending', 'retry') AND due_at IS NOT NULL;
CREATE INDEX task_executions_running ON pipeline.task_executions (worker_id) WHERE status = 'running';
CREATE INDEX task_executions_overdue ON pipeline.task_executions (deadline_at) WHERE status = 'running';

-- Attempts that were followed by another one; the last attempt of a task is its row in task_executions.
CREATE TABLE pipeline.task_attempts (
    execution_id     text COLLATE "C" NOT NULL,
    task_id          text COLLATE "C" NOT NULL,
    epoch            int NOT NULL,
    attempt          int NOT NULL,
    outcome          text NOT NULL,                 -- retry | lost | failed | skipped | cancelled
    worker_id        bigint,
    started_at       timestamptz,
    ended_at         timestamptz NOT NULL DEFAULT pipeline.clock(),
    error_type       text,
    error_message    text,
    error_traceback  text,
    PRIMARY KEY (execution_id, task_id, epoch)
);

-- Only the key is indexed, so that every decrement is a HOT update.
CREATE TABLE pipeline.join_counters (
    execution_id  text COLLATE "C" NOT NULL,
    number        int NOT NULL,
    remaining     int NOT NULL CHECK (remaining >= 0),
    PRIMARY KEY (execution_id, number)
) WITH (fillfactor = 40, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500,
        autovacuum_vacuum_cost_delay = 0);

-- One row per start of a process that runs tasks: an incarnation.
CREATE TABLE pipeline.workers (
    worker_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name          text NOT NULL,
    pid           int NOT NULL,
    started_at    timestamptz NOT NULL DEFAULT pipeline.clock(),
    heartbeat_at  timestamptz NOT NULL DEFAULT pipeline.clock(),
    expires_at    timestamptz NOT NULL
) WITH (fillfactor = 50);
CREATE INDEX workers_expires ON pipeline.workers (expires_at);

-- What people did to executions.
CREATE TABLE pipeline.workflow_events (
    event_id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    execution_id  text COLLATE "C" NOT NULL,
    task_id       text COLLATE "C",
    kind          text NOT NULL,
    user_id       text,
    at            timestamptz NOT NULL DEFAULT pipeline.clock(),
    detail        jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX workflow_events_execution ON pipeline.workflow_events (execution_id);

CREATE FUNCTION pipeline.lock_key(p_execution text) RETURNS bigint LANGUAGE sql IMMUTABLE AS
$$ SELECT hashtextextended(p_execution, 20) $$;

-- A task that a worker may claim, as the publisher needs it.
CREATE TYPE pipeline.ready_task AS (execution_id text, task_id text, epoch int, handler text, timeout double precision);

-- Record an execution of a stored definition with all its tasks and counters. One transaction with whatever the
-- caller's connection has open. `created` is false where the idempotency key was used before.
CREATE FUNCTION pipeline.create_execution(
    p_execution text, p_definition bigint, p_user text, p_key text, p_input jsonb, p_input_digest text,
    p_variables jsonb, p_deadline interval, p_grace interval
) RETURNS TABLE (created boolean, execution_id text, same_work boolean) LANGUAGE plpgsql AS $$
DECLARE
    workflow text;
BEGIN
    SELECT d.workflow_id INTO STRICT workflow FROM pipeline.workflow_definitions d WHERE d.definition_id = p_definition;
    INSERT INTO pipeline.workflow_executions AS e
        (execution_id, definition_id, workflow_id, created_by, idempotency_key, input_digest, deadline_at)
        VALUES (p_execution, p_definition, workflow, p_user, p_key, p_input_digest, pipeline.clock() + p_deadline)
        ON CONFLICT (workflow_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING;
    IF NOT FOUND THEN
        RETURN QUERY SELECT false, e.execution_id, e.definition_id = p_definition AND e.input_digest = p_input_digest
            FROM pipeline.workflow_executions e WHERE e.workflow_id = workflow AND e.idempotency_key = p_key;
        RETURN;
    END IF;
    INSERT INTO pipeline.workflow_states VALUES (p_execution, p_variables, p_input);
    INSERT INTO pipeline.task_executions (execution_id, task_id, handler, ready_at, due_at, hints)
        SELECT p_execution, t.task_id, t.handler,
               CASE WHEN t.waits_for = '{}' THEN pipeline.clock() END,
               CASE WHEN t.waits_for = '{}' THEN pipeline.clock() + p_grace END,
               CASE WHEN t.waits_for = '{}' THEN 1 ELSE 0 END
          FROM pipeline.workflow_tasks t WHERE t.definition_id = p_definition ORDER BY t.number;
    INSERT INTO pipeline.join_counters (execution_id, number, remaining)
        SELECT p_execution, h.number, cardinality(h.tasks)
          FROM pipeline.workflow_headers h WHERE h.definition_id = p_definition;
    RETURN QUERY SELECT true, p_execution, true;
END $$;

-- Give the task to a worker's incarnation, or return no row: the message was stale, doubled or forged, or the
-- execution takes no claims. A repeat of a claim whose answer was lost gives the same row again.
CREATE FUNCTION pipeline.claim_task(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_hard_limit interval
) RETURNS TABLE (definition_id bigint, epoch int, attempt int, retries int) LANGUAGE plpgsql AS $$
DECLARE
    x record;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);  -- a forgotten claim is only a second attempt
    PERFORM pg_advisory_xact_lock_shared(pipeline.lock_key(p_execution));
    SELECT e.definition_id, e.status, e.verdict, e.paused INTO x
      FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    IF NOT FOUND OR x.paused OR x.verdict IS NOT NULL OR x.status NOT IN ('pending', 'running', 'retry') THEN
        RETURN;
    END IF;
    RETURN QUERY
        UPDATE pipeline.task_executions t
           SET status = 'running', epoch = t.epoch + 1, attempt = t.attempt + 1, hints = 0, due_at = NULL,
               worker_id = p_worker, started_at = pipeline.clock(), progress = NULL, progress_message = NULL,
               error_type = NULL, error_message = NULL, error_traceback = NULL,
               deadline_at = pipeline.clock() + p_hard_limit + make_interval(secs => (
                   SELECT w.timeout FROM pipeline.workflow_tasks w
                    WHERE w.definition_id = x.definition_id AND w.task_id = p_task))
         WHERE t.execution_id = p_execution AND t.task_id = p_task AND t.epoch = p_epoch
           AND t.status IN ('pending', 'retry') AND t.due_at IS NOT NULL
           AND EXISTS (SELECT 1 FROM pipeline.workers k
                        WHERE k.worker_id = p_worker AND k.expires_at > pipeline.clock())
        RETURNING x.definition_id, t.epoch, t.attempt, t.retries;
    IF NOT FOUND THEN
        RETURN QUERY SELECT x.definition_id, t.epoch, t.attempt, t.retries FROM pipeline.task_executions t
            WHERE t.execution_id = p_execution AND t.task_id = p_task AND t.epoch = p_epoch + 1
              AND t.status = 'running' AND t.worker_id = p_worker;
        RETURN;
    END IF;
    IF x.status IN ('pending', 'retry') THEN
        UPDATE pipeline.workflow_executions e
           SET status = 'running', started_at = coalesce(e.started_at, pipeline.clock())
         WHERE e.execution_id = p_execution AND e.status IN ('pending', 'retry');
    END IF;
END $$;

-- Record a success and return what it released. The straight path: outcome is `done`; `stale` where the fence does
-- not hold; `again` where the execution needs the careful path (end_task) and nothing was changed.
CREATE FUNCTION pipeline.complete_task(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_result jsonb, p_grace interval
) RETURNS TABLE (outcome text, ready pipeline.ready_task[]) LANGUAGE plpgsql AS $$
DECLARE
    x record;
    plan record;
    number_ int;
    remaining_ int;
    released text[];
    ended boolean := false;
BEGIN
    PERFORM pg_advisory_xact_lock_shared(pipeline.lock_key(p_execution));
    SELECT e.definition_id, e.verdict, e.has_skips INTO x
      FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    IF x.verdict IS NOT NULL OR x.has_skips THEN
        RETURN QUERY SELECT 'again', NULL::pipeline.ready_task[];
        RETURN;
    END IF;
    UPDATE pipeline.task_executions t
       SET status = 'success', result = p_result, finished_at = pipeline.clock(), deadline_at = NULL
     WHERE t.execution_id = p_execution AND t.task_id = p_task
       AND t.status = 'running' AND t.epoch = p_epoch AND t.worker_id = p_worker;
    IF NOT FOUND THEN
        RETURN QUERY SELECT * FROM pipeline.repeat_of(p_execution, x.definition_id, p_task, p_epoch, p_worker);
        RETURN;
    END IF;
    SELECT w.releases, w.headers INTO plan
      FROM pipeline.workflow_tasks w WHERE w.definition_id = x.definition_id AND w.task_id = p_task;
    released := plan.releases;
    FOREACH number_ IN ARRAY plan.headers LOOP  -- ascending: the lock order of counters
        UPDATE pipeline.join_counters c SET remaining = c.remaining - 1
         WHERE c.execution_id = p_execution AND c.number = number_ RETURNING c.remaining INTO remaining_;
        IF remaining_ = 0 THEN
            ended := number_ = 0;
            released := released || (SELECT h.bodies FROM pipeline.workflow_headers h
                                      WHERE h.definition_id = x.definition_id AND h.number = number_);
        END IF;
    END LOOP;
    IF released <> '{}' THEN
        RETURN QUERY SELECT 'done', pipeline.make_ready(p_execution, x.definition_id, released, p_grace);
    ELSIF ended THEN
        PERFORM pipeline.close_execution(p_execution, 'success');
        RETURN QUERY SELECT 'done', NULL::pipeline.ready_task[];
    ELSE
        PERFORM set_config('synchronous_commit', 'off', true);
        RETURN QUERY SELECT 'done', NULL::pipeline.ready_task[];
    END IF;
END $$;

-- The answer to a completion that finds its row moved on: a repeat of itself is told again what it released.
CREATE FUNCTION pipeline.repeat_of(p_execution text, p_definition bigint, p_task text, p_epoch int, p_worker bigint)
RETURNS TABLE (outcome text, ready pipeline.ready_task[]) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1 FROM pipeline.task_executions t
      WHERE t.execution_id = p_execution AND t.task_id = p_task AND t.epoch = p_epoch AND t.worker_id = p_worker
        AND t.status IN ('success', 'failed', 'skipped', 'cancelled', 'retry');
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'stale', NULL::pipeline.ready_task[];
        RETURN;
    END IF;
    RETURN QUERY
        SELECT 'done', array_agg((t.execution_id, t.task_id, t.epoch, t.handler, w.timeout)::pipeline.ready_task)
          FROM pipeline.task_executions t
          JOIN pipeline.workflow_tasks w ON w.definition_id = p_definition AND w.task_id = t.task_id
         WHERE t.execution_id = p_execution AND w.waits_for @> ARRAY[p_task]
           AND t.status = 'pending' AND t.due_at IS NOT NULL;
END $$;

-- Mark tasks as ready for a claim and return them for publishing.
CREATE FUNCTION pipeline.make_ready(p_execution text, p_definition bigint, p_tasks text[], p_grace interval)
RETURNS pipeline.ready_task[] LANGUAGE plpgsql AS $$
DECLARE
    ready pipeline.ready_task[];
BEGIN
    IF cardinality(p_tasks) > 1 THEN
        PERFORM 1 FROM pipeline.task_executions t
          WHERE t.execution_id = p_execution AND t.task_id = ANY (p_tasks) ORDER BY t.task_id FOR NO KEY UPDATE;
    END IF;
    WITH moved AS (
        UPDATE pipeline.task_executions t
           SET ready_at = pipeline.clock(), due_at = pipeline.clock() + p_grace, hints = 1
         WHERE t.execution_id = p_execution AND t.task_id = ANY (p_tasks) AND t.status = 'pending' AND t.due_at IS NULL
        RETURNING t.task_id, t.epoch, t.handler)
    SELECT array_agg((p_execution, m.task_id, m.epoch, m.handler, w.timeout)::pipeline.ready_task ORDER BY w.number)
      INTO ready
      FROM moved m JOIN pipeline.workflow_tasks w ON w.definition_id = p_definition AND w.task_id = m.task_id;
    RETURN ready;
END $$;

-- The one place that ends an execution. The only NOTIFY of the engine beside `cancel`: it serialises commits.
CREATE FUNCTION pipeline.close_execution(p_execution text, p_status text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE pipeline.workflow_executions e
       SET status = p_status, finished_at = pipeline.clock(), started_at = coalesce(e.started_at, pipeline.clock()),
           paused = false
     WHERE e.execution_id = p_execution AND e.status IN ('pending', 'running', 'retry');
    IF FOUND THEN
        PERFORM pg_notify('pipeline_finished', p_execution);
    END IF;
END $$;

-- Decide how an execution ends: what has not started never will, and once nothing runs it is closed.
-- The caller holds the execution's lock exclusively.
CREATE FUNCTION pipeline.decide(p_execution text, p_verdict text, p_task_status text, p_reason text)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE pipeline.workflow_executions e SET verdict = p_verdict, error_message = p_reason
     WHERE e.execution_id = p_execution AND e.verdict IS NULL AND e.status IN ('pending', 'running', 'retry');
    UPDATE pipeline.task_executions t
       SET status = p_task_status, finished_at = pipeline.clock(), due_at = NULL,
           error_message = coalesce(t.error_message || '; ', '') || p_reason
     WHERE t.execution_id = p_execution AND t.status IN ('pending', 'retry');
    PERFORM pipeline.close_if_idle(p_execution);
END $$;

CREATE FUNCTION pipeline.close_if_idle(p_execution text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    decided text;
BEGIN
    SELECT e.verdict INTO decided FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    IF decided IS NOT NULL AND NOT EXISTS (SELECT 1 FROM pipeline.task_executions t
                                            WHERE t.execution_id = p_execution AND t.status = 'running') THEN
        PERFORM pipeline.close_execution(p_execution, decided);
    END IF;
END $$;

-- Record any end of an attempt, with all its consequences: the careful path, alone in its execution.
--   p_outcome  success | failed | skipped | cancelled | retry (due again after p_delay) | lost (its worker is gone)
-- `lost` is given the budget: a task that lost more workers than that fails.
CREATE FUNCTION pipeline.end_task(
    p_execution text, p_task text, p_epoch int, p_worker bigint, p_outcome text, p_result jsonb,
    p_error_type text, p_error_message text, p_error_traceback text, p_delay interval, p_loss_budget int,
    p_grace interval
) RETURNS TABLE (outcome text, ready pipeline.ready_task[]) LANGUAGE plpgsql AS $$
DECLARE
    x record;
    t record;
    target text := p_outcome;
    message text := p_error_message;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    SELECT e.definition_id, e.verdict INTO x FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    SELECT r.* INTO t FROM pipeline.task_executions r
     WHERE r.execution_id = p_execution AND r.task_id = p_task
       AND r.status = 'running' AND r.epoch = p_epoch AND r.worker_id = p_worker FOR UPDATE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT * FROM pipeline.repeat_of(p_execution, x.definition_id, p_task, p_epoch, p_worker);
        RETURN;
    END IF;
    IF target IN ('retry', 'lost') THEN
        IF x.verdict IS NOT NULL THEN
            target := x.verdict;
        ELSIF target = 'lost' AND t.losses >= p_loss_budget THEN
            target := 'failed';
            message := format('lost its worker %s times, more than the budget of %s allows; last: %s',
                              t.losses + 1, p_loss_budget, p_error_message);
        END IF;
    END IF;
    IF target IN ('retry', 'lost') THEN
        INSERT INTO pipeline.task_attempts (execution_id, task_id, epoch, attempt, outcome, worker_id, started_at,
                                            error_type, error_message, error_traceback)
            VALUES (p_execution, p_task, p_epoch, t.attempt, target, p_worker, t.started_at,
                    p_error_type, p_error_message, p_error_traceback);
        UPDATE pipeline.task_executions r
           SET status = CASE target WHEN 'retry' THEN 'retry' ELSE 'pending' END,
               retries = r.retries + (target = 'retry')::int, losses = r.losses + (target = 'lost')::int,
               due_at = pipeline.clock() + coalesce(p_delay, '0'), hints = 0, deadline_at = NULL,
               error_type = p_error_type, error_message = p_error_message, error_traceback = p_error_traceback
         WHERE r.execution_id = p_execution AND r.task_id = p_task;
        RETURN QUERY SELECT 'done', NULL::pipeline.ready_task[];
        RETURN;
    END IF;
    UPDATE pipeline.task_executions r
       SET status = target, finished_at = pipeline.clock(), deadline_at = NULL, result = p_result,
           error_type = p_error_type, error_message = message, error_traceback = p_error_traceback
     WHERE r.execution_id = p_execution AND r.task_id = p_task;
    IF x.verdict IS NOT NULL THEN
        PERFORM pipeline.close_if_idle(p_execution);
        RETURN QUERY SELECT 'done', NULL::pipeline.ready_task[];
    ELSIF target = 'failed' THEN
        PERFORM pipeline.decide(p_execution, 'failed', 'skipped', format('task %s failed: %s', p_task, message));
        RETURN QUERY SELECT 'done', NULL::pipeline.ready_task[];
    ELSIF target = 'cancelled' THEN
        PERFORM pipeline.decide(p_execution, 'cancelled', 'cancelled', format('task %s was cancelled', p_task));
        RETURN QUERY SELECT 'done', NULL::pipeline.ready_task[];
    ELSE
        IF target = 'skipped' THEN
            UPDATE pipeline.workflow_executions e SET has_skips = true WHERE e.execution_id = p_execution;
        END IF;
        RETURN QUERY SELECT 'done', pipeline.release(p_execution, x.definition_id, p_task, p_grace);
    END IF;
END $$;

-- Release what waited for a task that ended well or was skipped. A task with a skipped dependency is skipped when its
-- turn comes, and releases in turn. The caller holds the execution's lock exclusively.
CREATE FUNCTION pipeline.release(p_execution text, p_definition bigint, p_task text, p_grace interval)
RETURNS pipeline.ready_task[] LANGUAGE plpgsql AS $$
DECLARE
    ended text[] := ARRAY[p_task];
    candidates text[];
    runnable text[] := '{}';
    plan record;
    number_ int;
    remaining_ int;
    skipped text[];
    over boolean := false;
BEGIN
    WHILE cardinality(ended) > 0 LOOP
        SELECT w.releases, w.headers INTO plan
          FROM pipeline.workflow_tasks w WHERE w.definition_id = p_definition AND w.task_id = ended[1];
        candidates := plan.releases;
        FOREACH number_ IN ARRAY plan.headers LOOP
            UPDATE pipeline.join_counters c SET remaining = c.remaining - 1
             WHERE c.execution_id = p_execution AND c.number = number_ RETURNING c.remaining INTO remaining_;
            IF remaining_ = 0 THEN
                over := over OR number_ = 0;
                candidates := candidates || (SELECT h.bodies FROM pipeline.workflow_headers h
                                              WHERE h.definition_id = p_definition AND h.number = number_);
            END IF;
        END LOOP;
        WITH barred AS (
            SELECT w.task_id, min(d.task_id) AS because
              FROM pipeline.workflow_tasks w
              JOIN pipeline.task_executions d
                ON d.execution_id = p_execution AND d.task_id = ANY (w.dependencies) AND d.status = 'skipped'
             WHERE w.definition_id = p_definition AND w.task_id = ANY (candidates)
             GROUP BY w.task_id
        ), moved AS (
            UPDATE pipeline.task_executions t
               SET status = 'skipped', finished_at = pipeline.clock(),
                   error_message = format('dependency %s was skipped', b.because)
              FROM barred b
             WHERE t.execution_id = p_execution AND t.task_id = b.task_id AND t.status = 'pending'
            RETURNING t.task_id)
        SELECT coalesce(array_agg(m.task_id ORDER BY m.task_id), '{}') INTO skipped FROM moved m;
        runnable := runnable || ARRAY(SELECT c FROM unnest(candidates) c WHERE c <> ALL (skipped));
        ended := ended[2:] || skipped;
    END LOOP;
    IF over THEN
        PERFORM pipeline.close_execution(p_execution, 'success');
    END IF;
    RETURN pipeline.make_ready(p_execution, p_definition, runnable, p_grace);
END $$;

-- Steering: each returns the status it found, and acts only from the states named; NULL where there is no execution.
CREATE FUNCTION pipeline.cancel_execution(p_execution text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    x record;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
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

CREATE FUNCTION pipeline.pause_execution(p_execution text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    found_ text;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    SELECT e.status INTO found_ FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    UPDATE pipeline.workflow_executions e SET paused = true
     WHERE e.execution_id = p_execution AND NOT e.paused AND e.verdict IS NULL
       AND e.status IN ('pending', 'running', 'retry');
    IF FOUND THEN
        INSERT INTO pipeline.workflow_events (execution_id, kind, user_id) VALUES (p_execution, 'pause', p_user);
    END IF;
    RETURN found_;
END $$;

CREATE FUNCTION pipeline.resume_execution(p_execution text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    found_ text;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    SELECT e.status INTO found_ FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    UPDATE pipeline.workflow_executions e SET paused = false WHERE e.execution_id = p_execution AND e.paused;
    IF FOUND THEN
        INSERT INTO pipeline.workflow_events (execution_id, kind, user_id) VALUES (p_execution, 'resume', p_user);
        UPDATE pipeline.task_executions t
           SET due_at = CASE t.status WHEN 'retry' THEN t.due_at ELSE pipeline.clock() END, hints = 0
         WHERE t.execution_id = p_execution AND t.status IN ('pending', 'retry') AND t.due_at IS NOT NULL;
    END IF;
    RETURN found_;
END $$;

-- Open an execution that failed or was cancelled again: what succeeded is kept, everything else starts afresh.
-- Counters are computed from the rows, never patched.
CREATE FUNCTION pipeline.retry_execution(p_execution text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    x record;
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    SELECT e.status, e.definition_id, e.deadline_at - e.created_at AS allowance INTO x
      FROM pipeline.workflow_executions e WHERE e.execution_id = p_execution;
    IF x.status IS NULL OR x.status NOT IN ('failed', 'cancelled') THEN
        RETURN x.status;
    END IF;
    INSERT INTO pipeline.workflow_events (execution_id, kind, user_id) VALUES (p_execution, 'retry', p_user);
    INSERT INTO pipeline.task_attempts (execution_id, task_id, epoch, attempt, outcome, worker_id, started_at, ended_at,
                                        error_type, error_message, error_traceback)
        SELECT t.execution_id, t.task_id, t.epoch, t.attempt, t.status, t.worker_id, t.started_at, t.finished_at,
               t.error_type, t.error_message, t.error_traceback
          FROM pipeline.task_executions t
         WHERE t.execution_id = p_execution AND t.status IN ('failed', 'skipped', 'cancelled') AND t.attempt > 0
        ON CONFLICT DO NOTHING;  -- a task that was waiting for a retry has its attempt there already
    UPDATE pipeline.workflow_executions e
       SET status = 'retry', verdict = NULL, has_skips = false, error_message = NULL, finished_at = NULL,
           run = e.run + 1, deadline_at = pipeline.clock() + x.allowance
     WHERE e.execution_id = p_execution;
    UPDATE pipeline.task_executions t
       SET status = 'pending', epoch = t.epoch + 1, retries = 0, losses = 0, hints = 0, finished_at = NULL,
           due_at = NULL, ready_at = NULL, worker_id = NULL, result = NULL,
           error_type = NULL, error_message = NULL, error_traceback = NULL
     WHERE t.execution_id = p_execution AND t.status IN ('failed', 'skipped', 'cancelled');
    UPDATE pipeline.join_counters c
       SET remaining = (SELECT count(*) FROM pipeline.task_executions t
                         WHERE t.execution_id = p_execution AND t.task_id = ANY (h.tasks) AND t.status <> 'success')
      FROM pipeline.workflow_headers h
     WHERE c.execution_id = p_execution AND h.definition_id = x.definition_id AND h.number = c.number;
    UPDATE pipeline.task_executions t SET due_at = pipeline.clock(), ready_at = pipeline.clock()
      FROM pipeline.workflow_tasks w
     WHERE t.execution_id = p_execution AND w.definition_id = x.definition_id AND w.task_id = t.task_id
       AND t.status = 'pending'
       AND NOT EXISTS (SELECT 1 FROM pipeline.task_executions d
                        WHERE d.execution_id = p_execution AND d.task_id = ANY (w.waits_for) AND d.status <> 'success');
    IF NOT EXISTS (SELECT 1 FROM pipeline.task_executions t
                    WHERE t.execution_id = p_execution AND t.status <> 'success') THEN
        PERFORM pipeline.close_execution(p_execution, 'success');
    END IF;
    RETURN x.status;
END $$;

-- End an execution whose time is up; true where it was.
CREATE FUNCTION pipeline.expire_execution(p_execution text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(pipeline.lock_key(p_execution));
    PERFORM 1 FROM pipeline.workflow_executions e
      WHERE e.execution_id = p_execution AND e.deadline_at <= pipeline.clock() AND e.verdict IS NULL
        AND e.status IN ('pending', 'running', 'retry');
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM pipeline.decide(p_execution, 'failed', 'skipped', 'the execution ran longer than the timeout of its workflow');
    PERFORM pg_notify('pipeline_stop', p_execution);
    RETURN true;
END $$;

-- Every violated invariant; empty where all is well.
CREATE FUNCTION pipeline.audit() RETURNS TABLE (violation text, execution_id text, subject text) LANGUAGE sql AS $$
    WITH task AS (
        SELECT t.*, w.waits_for, w.dependencies, e.status AS execution_status, e.verdict
          FROM pipeline.task_executions t
          JOIN pipeline.workflow_executions e USING (execution_id)
          JOIN pipeline.workflow_tasks w ON w.definition_id = e.definition_id AND w.task_id = t.task_id)
    SELECT 'started before its dependencies succeeded', t.execution_id, t.task_id FROM task t
     WHERE t.status IN ('running', 'retry', 'success', 'failed')
       AND EXISTS (SELECT 1 FROM pipeline.task_executions d WHERE d.execution_id = t.execution_id
                    AND d.task_id = ANY (t.dependencies) AND d.status <> 'success')
    UNION ALL
    SELECT 'ready although something it waits for is open', t.execution_id, t.task_id FROM task t
     WHERE t.status IN ('pending', 'retry') AND t.due_at IS NOT NULL
       AND EXISTS (SELECT 1 FROM pipeline.task_executions d WHERE d.execution_id = t.execution_id
                    AND d.task_id = ANY (t.waits_for) AND d.status IN ('pending', 'running', 'retry'))
    UNION ALL
    SELECT 'never released', t.execution_id, t.task_id FROM task t
     WHERE t.status = 'pending' AND t.due_at IS NULL AND t.verdict IS NULL
       AND NOT EXISTS (SELECT 1 FROM pipeline.task_executions d WHERE d.execution_id = t.execution_id
                        AND d.task_id = ANY (t.waits_for) AND d.status IN ('pending', 'running', 'retry'))
    UNION ALL
    SELECT 'waits for a retry that never comes', t.execution_id, t.task_id FROM task t
     WHERE t.status = 'retry' AND t.due_at IS NULL
    UNION ALL
    SELECT 'counter differs from its open tasks', c.execution_id, c.number::text
      FROM pipeline.join_counters c
      JOIN pipeline.workflow_executions e USING (execution_id)
      JOIN pipeline.workflow_headers h ON h.definition_id = e.definition_id AND h.number = c.number
     WHERE e.verdict IS NULL AND e.status IN ('pending', 'running', 'retry')
       AND c.remaining <> (SELECT count(*) FROM pipeline.task_executions t
                            WHERE t.execution_id = c.execution_id AND t.task_id = ANY (h.tasks)
                              AND t.status NOT IN ('success', 'skipped'))
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
    SELECT 'running on a worker that never was', t.execution_id, t.task_id FROM task t
     WHERE t.status = 'running' AND NOT EXISTS (SELECT 1 FROM pipeline.workers k WHERE k.worker_id = t.worker_id)
$$;
