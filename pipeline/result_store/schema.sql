-- The result store: Postgres is the truth, a Celery message is a hint.
--
-- A definition is stored once, together with its compiled plan (workflow_tasks, workflow_headers). An execution is a
-- copy of the plan's moving parts: one row per task (task_executions) and one counter per header (join_counters).
--
-- due_at is the whole hint protocol. NULL: dependencies open, or claimed, or over. A time: the task may be claimed;
-- when the time passes, recovery publishes its message (again). Submitting and completing set it a grace ahead and
-- publish themselves; a retry sets it to the end of its delay. Infinity: parked, as the execution was paused then.
--
-- A claim raises the epoch and writes the worker's incarnation: (epoch, worker_id) is the fence, what does not hold it
-- changes nothing. An attempt that ended otherwise than the task did is kept in task_attempts.
--
-- Locks. Whoever moves one task along the straight path (claim, success) holds the execution's advisory lock shared;
-- whoever changes the execution as a whole (failure, skip, retry, loss, cancel, pause, resume, retry of the execution)
-- holds it exclusively and then needs no care for rivals. On the straight path rows are locked in one order: own task,
-- counters by number, released tasks in topological order, the execution last. Whoever holds the lock of one execution does
-- not wait for another's.
--
-- Straight-path commits that release nothing may be asynchronous: WAL is sequential, so the commit that releases a
-- successor makes all earlier ones durable before anything is published, or started that builds on them.

CREATE SCHEMA pipeline;

-- Tests set the clock: SET pipeline.fake_now = '2026-01-01 00:00:00+00'. In SQL, Postgres before 18 would plan it with each call.
CREATE FUNCTION pipeline.clock() RETURNS timestamptz LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN coalesce(nullif(current_setting('pipeline.fake_now', true), '')::timestamptz, clock_timestamp());
END $$;

-- What the rows of executions and tasks must be at any time. A CHECK that says so in full would be read anew from its text
-- with each change of a row; one that calls a function is short.
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
    params         json,                   -- json keeps their order; NULL: none
    retry_policy   json,                   -- NULL: the default
    slots          int[],                  -- of each of its headers, the slot that counts it; NULL: none does
    PRIMARY KEY (definition_id, task_id)
);

CREATE TABLE pipeline.workflow_headers (
    definition_id  bigint NOT NULL,
    number         int NOT NULL,           -- 0: the end of the workflow
    tasks          text[] NOT NULL,
    bodies         text[] NOT NULL,        -- tasks that start when all of the header succeeded
    slots          int[] NOT NULL DEFAULT '{}',  -- how many tasks each slot counts, from 1 on; empty: one counter does
    PRIMARY KEY (definition_id, number)
);

CREATE TABLE pipeline.workflow_executions (
    execution_id     text COLLATE "C" PRIMARY KEY,
    definition_id    bigint NOT NULL,
    workflow_id      text COLLATE "C" NOT NULL,
    status           text NOT NULL DEFAULT 'pending',
    verdict          text,                 -- decided while running tasks still end; no claim from then on
    paused           boolean NOT NULL DEFAULT false,
    careful          boolean NOT NULL DEFAULT false,  -- completions must look at the tasks they release, see `release`
    run              int NOT NULL DEFAULT 1,          -- +1 with each retry of the execution
    created_by       text,
    idempotency_key  text,
    input_digest     text NOT NULL,
    error_message    text,
    created_at       timestamptz NOT NULL DEFAULT pipeline.clock(),
    started_at       timestamptz,
    finished_at      timestamptz,
    deadline_at      timestamptz,
    queue_timeout    interval,             -- how long a ready task may wait for a worker
    forgotten        boolean NOT NULL DEFAULT false,  -- its artifacts are being deleted; nobody may open it again
    awaited          boolean NOT NULL DEFAULT false,  -- somebody listens for its end
    CONSTRAINT workflow_executions_fits CHECK (pipeline.fits_execution(status, verdict, finished_at))
) WITH (fillfactor = 80);
CREATE UNIQUE INDEX workflow_executions_key ON pipeline.workflow_executions (workflow_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX workflow_executions_created ON pipeline.workflow_executions (created_at);
CREATE INDEX workflow_executions_deadline ON pipeline.workflow_executions (deadline_at)
    WHERE deadline_at IS NOT NULL AND finished_at IS NULL;

CREATE INDEX workflow_executions_queue ON pipeline.workflow_executions (execution_id)
    WHERE queue_timeout IS NOT NULL AND finished_at IS NULL;
CREATE INDEX workflow_executions_finished_at ON pipeline.workflow_executions (finished_at)
    WHERE finished_at IS NOT NULL;

-- Executions of which every task succeeded, and that have not ended yet: whoever ran the last task closes several at once, so
-- that they share one wait for the disk. When the time passes, recovery does.
CREATE TABLE pipeline.closings (
    execution_id  text COLLATE "C" PRIMARY KEY,
    due_at        timestamptz NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX closings_due ON pipeline.closings (due_at);

CREATE TABLE pipeline.workflow_states (
    execution_id  text COLLATE "C" PRIMARY KEY,
    variables     jsonb NOT NULL,
    input_data    jsonb NOT NULL
) PARTITION BY RANGE (execution_id);
CREATE TABLE pipeline.workflow_states_default PARTITION OF pipeline.workflow_states DEFAULT;

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
    params            jsonb,                        -- replaces the definition's params, where somebody gave others
    progress          real,
    progress_message  text,
    result            jsonb,
    error_type        text,
    error_message     text,                         -- of a skipped task: why
    error_traceback   text,
    led_by            text COLLATE "C",             -- whose message it shares; NULL: it has, or needs, one of its own
    led_in            text COLLATE "C",             -- of which execution, where that is another; without led_by it says nothing
    leads             text[],                       -- executions that joined its message, which does not name them; NULL: none may
    PRIMARY KEY (execution_id, task_id),
    CONSTRAINT task_executions_fits CHECK (pipeline.fits_task(status, finished_at, worker_id, deadline_at, due_at, led_by))
) PARTITION BY RANGE (execution_id);
CREATE TABLE pipeline.task_executions_default PARTITION OF pipeline.task_executions DEFAULT
    WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
          autovacuum_vacuum_cost_delay = 0);
CREATE INDEX task_executions_due ON pipeline.task_executions (due_at)
    WHERE status IN ('pending', 'retry') AND due_at IS NOT NULL;
-- Only for those who name the deadline too. An attempt's end, which finds its task by the key, must not come by this index:
-- it would walk over all that the worker has run since the last VACUUM, by a plan from when the table was empty.
CREATE INDEX task_executions_running ON pipeline.task_executions (worker_id)
    WHERE status = 'running' AND deadline_at IS NOT NULL;

-- Attempts that were followed by another one; the last attempt of a task is its row in task_executions.
CREATE TABLE pipeline.task_attempts (
    execution_id     text COLLATE "C" NOT NULL,
    task_id          text COLLATE "C" NOT NULL,
    epoch            int NOT NULL,
    attempt          int NOT NULL,
    outcome          text NOT NULL,                 -- retry | lost | released | failed | skipped | cancelled | success
    worker_id        bigint,
    started_at       timestamptz,
    ended_at         timestamptz NOT NULL DEFAULT pipeline.clock(),
    error_type       text,
    error_message    text,
    error_traceback  text,
    PRIMARY KEY (execution_id, task_id, epoch)
) PARTITION BY RANGE (execution_id);
CREATE TABLE pipeline.task_attempts_default PARTITION OF pipeline.task_attempts DEFAULT;

-- What a header waits for. Slot 0 counts its open tasks; those of a wide header are counted in further slots, and slot 0
-- counts the slots that are not down yet, for a row that each end of a task locks would hold many workers up.
-- Only the key is indexed, so that every decrement is a HOT update.
CREATE TABLE pipeline.join_counters (
    execution_id  text COLLATE "C" NOT NULL,
    number        int NOT NULL,
    remaining     int NOT NULL CHECK (remaining >= 0),
    slot          int NOT NULL DEFAULT 0,
    PRIMARY KEY (execution_id, number, slot)
) PARTITION BY RANGE (execution_id);
CREATE TABLE pipeline.join_counters_default PARTITION OF pipeline.join_counters DEFAULT
    WITH (fillfactor = 40, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500,
          autovacuum_vacuum_cost_delay = 0);

-- The bulk of an execution (states, tasks, attempts, counters) lies in partitions by the day of its creation, which its id
-- begins with, so that what was forgotten leaves with a DROP. Each row is one partition of each of the four tables. Days
-- without one are in the default partitions; so are ids that do not begin with a day, as random ones do that are older.
CREATE TABLE pipeline.partitions (
    first_day  int PRIMARY KEY,            -- since 1970
    last_day   int NOT NULL
);

-- One row per start of a process that runs tasks: an incarnation.
CREATE TABLE pipeline.workers (
    worker_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name          text NOT NULL,
    pid           int NOT NULL,
    handlers      text[] NOT NULL DEFAULT '{}',     -- that it knows
    started_at    timestamptz NOT NULL DEFAULT pipeline.clock(),
    heartbeat_at  timestamptz NOT NULL DEFAULT pipeline.clock(),
    expires_at    timestamptz NOT NULL,
    slow          text[] NOT NULL DEFAULT '{}',     -- of the handlers, those whose runs are long
    quick         text[] NOT NULL DEFAULT '{}'      -- and those whose runs are next to nothing
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
CREATE TYPE pipeline.ready_task AS (
    execution_id text, task_id text, epoch int, handler text, timeout double precision, led_by text, led_in text);

-- A task that was just claimed, as its worker needs it; with the results of its dependencies where they are few and small.
CREATE TYPE pipeline.claimed_task AS (
    execution_id text, task_id text, handler text, epoch int, attempt int, retries int, params json, results jsonb,
    timeout double precision, dependencies text[], retry_policy json, leads text[]);

-- How many processes could run tasks now, and which handlers they know to be slow, or quick.
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

-- Whether others may join the message that a task of this handler is about to get: by the rules of `share`, and where it will
-- wait in the broker, behind two for each process. What a busy worker has fetched may wait for long while another one idles.
-- Only the messages of the last second are looked at, for the index holds all that was claimed since the last VACUUM.
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

-- Have the first task of a new execution share the message of another one of its workflow, which does not name it: whoever
-- claims that task is told of this one. False where the other was claimed already, and where the caller would have to wait.
-- What waits for more than a second may wait for recovery.
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

-- Record executions of a stored definition with all their tasks and counters, and return those that are ready; `number` is
-- the place in p_work, a list of execution_id, idempotency_key, input_data and input_digest. One transaction with whatever the
-- caller's connection has open. `created` is false where the idempotency key was used before; no row where the id belongs to
-- another execution. Where each begins with one task, several of these share a message, by the rules of `share`.
-- With p_leader, the execution that the caller enqueued last, or an empty one, a single one joins its message where it can, and
-- `ready` is empty; where it cannot, others may join its own. Without, the caller's transaction might keep workers waiting.
-- Plans are kept whatever the caller's session says: two of the statements would else be planned with each call.
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

-- Give the task to a worker's incarnation, or return NULL: the message was stale, doubled or forged, or the execution
-- takes no claims. The caller holds the execution's lock.
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

-- The claim of a task that a worker's incarnation made already: told again where the answer was lost.
CREATE FUNCTION pipeline.taken_before(
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

-- What every task of an execution may read; it never changes.
CREATE FUNCTION pipeline.state_of(p_execution text) RETURNS jsonb LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT jsonb_build_object('workflow_id', e.workflow_id, 'created_by', e.created_by,
                                      'variables', s.variables, 'input_data', s.input_data)
              FROM pipeline.workflow_executions e JOIN pipeline.workflow_states s USING (execution_id)
             WHERE e.execution_id = p_execution);
END $$;

-- What a message asks for: the task, or no row.
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

-- Record a success and return what it released. The straight path: outcome is `done`; `stale` where the fence does
-- not hold; `again` where the execution needs the careful path (end_task) and nothing was changed.
-- With p_room, the longest timeout that may follow, the worker goes on at once: `next` is claimed for it, the first task
-- that was released or, where none was, p_next of p_next_execution with the epoch and handler of the message that named it.
-- A task of another execution goes before what was released, which the worker then keeps for later where one message would
-- do for it. Nothing of that is seen outside, so the commit is asynchronous: `durable` is false, and the worker starts what
-- it keeps only after a call that was durable, as one with p_durable is. So many executions share one wait for the disk. Nor
-- does an execution end in a call that is not: `closing` are those that the worker brings as p_closing with its next call.
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

-- Take a task of another execution than the one whose lock the caller holds, for the worker to go on with. Who holds a lock
-- waits for none: where it is not to be had, the worker asks for the task later.
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

-- Tasks of a shared message that its reader will not come to soon: each gets a message of its own. Where somebody changes the
-- execution at this moment they are left to recovery, for who asks has others to look after.
CREATE FUNCTION pipeline.scatter(p_execution text, p_tasks text[], p_epochs int[], p_grace interval)
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

-- The answer to a completion that finds its row moved on: a repeat of itself is told again what it released, but for
-- what a cascade of skips released, which recovery publishes. The lock is written to the WAL, so that the commit waits for the
-- disk, as the first one may not have: what it released is published now.
CREATE FUNCTION pipeline.repeat_of(
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

-- Mark tasks as ready for a claim and return them for publishing. One after the other by their keys: of one statement for
-- all, Postgres makes a plan that compares each with each where it takes executions for small.
CREATE FUNCTION pipeline.make_ready(p_execution text, p_definition bigint, p_tasks text[], p_grace interval)
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

-- The one place that ends an execution. NOTIFY serialises commits and wakes all who listen, to whatever: it is there for
-- those who wait only, and to stop what runs.
CREATE FUNCTION pipeline.close_execution(p_execution text, p_status text) RETURNS void LANGUAGE plpgsql AS $$
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

-- End an execution that was left open although every task of it succeeded: whoever steers it comes too late. True where it was.
-- The caller holds its lock.
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

-- End those that were left open; returns how many it was. Who has one locked ends it, or changes its mind: then recovery does.
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

-- Decide how an execution ends: what has not started never will, and once nothing runs it is closed.
-- The caller holds the execution's lock exclusively.
CREATE FUNCTION pipeline.decide(p_execution text, p_verdict text, p_task_status text, p_reason text)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE pipeline.workflow_executions e SET verdict = p_verdict, error_message = p_reason
     WHERE e.execution_id = p_execution AND e.verdict IS NULL AND e.status IN ('pending', 'running', 'retry');
    UPDATE pipeline.task_executions t
       SET status = p_task_status, finished_at = pipeline.clock(), due_at = NULL, led_by = NULL,
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
--              | released (its worker gave it back)
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
        RETURN QUERY SELECT * FROM pipeline.repeat_of(
            p_execution, x.definition_id, p_task, p_epoch, p_worker, p_outcome);
        RETURN;
    END IF;
    IF target IN ('retry', 'lost', 'released') THEN
        IF x.verdict IS NOT NULL THEN
            target := x.verdict;
        ELSIF target = 'lost' AND t.losses >= p_loss_budget THEN
            target := 'failed';
            message := format('lost its worker %s times, more than the budget of %s allows; last: %s',
                              t.losses + 1, p_loss_budget, p_error_message);
        END IF;
    END IF;
    IF target IN ('retry', 'lost', 'released') THEN
        INSERT INTO pipeline.task_attempts (execution_id, task_id, epoch, attempt, outcome, worker_id, started_at,
                                            error_type, error_message, error_traceback)
            VALUES (p_execution, p_task, p_epoch, t.attempt, target, p_worker, t.started_at,
                    p_error_type, p_error_message, p_error_traceback);
        UPDATE pipeline.task_executions r
           SET status = CASE target WHEN 'retry' THEN 'retry' ELSE 'pending' END,
               retries = r.retries + (target = 'retry')::int, losses = r.losses + (target = 'lost')::int,
               due_at = pipeline.clock() + coalesce(p_delay, '0'), hints = 0, deadline_at = NULL,
               ready_at = CASE target WHEN 'retry' THEN r.ready_at ELSE pipeline.clock() END,
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
            UPDATE pipeline.workflow_executions e SET careful = true WHERE e.execution_id = p_execution;
        END IF;
        RETURN QUERY SELECT 'done', pipeline.release(p_execution, x.definition_id, p_task, p_grace);
    END IF;
END $$;

-- Release what waited for a task that ended well or was skipped, wave by wave. A task with a skipped dependency is
-- skipped when its turn comes, and releases in turn; so does, uncounted, one that succeeded in an earlier run behind a
-- task that was skipped then. The caller holds the execution's lock exclusively.
CREATE FUNCTION pipeline.release(p_execution text, p_definition bigint, p_task text, p_grace interval)
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
-- shares a message is left to it until that message's first task was claimed a while ago, or is otherwise gone; until then it
-- is put off a little each time, so that however many wait, each one's turn to be looked at comes.
CREATE FUNCTION pipeline.take_due(p_limit int, p_first_only boolean, p_grace interval)
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

-- Steering: each returns the status it found, and acts only from the states named; NULL where there is no execution.
CREATE FUNCTION pipeline.cancel_execution(p_execution text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
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

CREATE FUNCTION pipeline.pause_execution(p_execution text, p_user text) RETURNS text LANGUAGE plpgsql AS $$
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
           SET due_at = pipeline.clock(), hints = 0, led_by = NULL
         WHERE t.execution_id = p_execution
           AND (t.status = 'pending' AND t.due_at IS NOT NULL OR t.status = 'retry' AND t.due_at = 'infinity');
    END IF;
    RETURN found_;
END $$;

-- Open an ended execution again. With p_from NULL, from what did not succeed (a failed or cancelled one); else from that
-- task with everything downstream of it, and what did not succeed besides. What else succeeded is kept.
-- Counters are computed from the rows, never patched. Where tasks run one after another, some may have succeeded behind
-- one that starts afresh: then only the first open task may start, and completions pass over what succeeded.
CREATE FUNCTION pipeline.reopen_execution(p_execution text, p_user text, p_from text, p_params jsonb)
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

-- Decide a task by hand, once its turn has come: success or skipped, whatever it is doing. Where the execution has
-- failed or was cancelled it is opened again first. An attempt that runs loses its fence. Returns the status found, NULL
-- where there is no such task, `waiting` where it waits for others.
CREATE FUNCTION pipeline.mark_task(
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

-- End an execution whose time is up, or whose tasks waited too long for a worker; true where it was.
CREATE FUNCTION pipeline.expire_execution(p_execution text) RETURNS boolean LANGUAGE plpgsql AS $$
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
CREATE FUNCTION pipeline.forget_executions(p_executions text[]) RETURNS int LANGUAGE plpgsql AS $$
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
CREATE FUNCTION pipeline.audit() RETURNS TABLE (violation text, execution_id text, subject text) LANGUAGE sql AS $$
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
