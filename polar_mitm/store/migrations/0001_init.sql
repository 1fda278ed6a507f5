-- Read the views; the tables named _rows and _log hide how rows are packed. No table has a key: an index would
-- cost more bytes than the tokens of a call, and the one writer keeps ids unique.

CREATE TABLE rollout_rows (
    rollout_id VARCHAR NOT NULL,
    group_id VARCHAR,
    task_id VARCHAR,
    sample_index INTEGER,
    harness VARCHAR,
    harness_version VARCHAR,
    command VARCHAR,                -- JSON list
    status VARCHAR,
    stop_reason VARCHAR,
    exit_code INTEGER,
    incomplete VARCHAR,             -- why the record has holes; such a rollout is never trained on
    engine VARCHAR,
    model VARCHAR,
    started_at DOUBLE,
    ended_at DOUBLE
);

CREATE TABLE call_rows (
    call_id VARCHAR NOT NULL,
    rollout_id VARCHAR NOT NULL,
    seq BIGINT,
    dialect VARCHAR,
    route VARCHAR,
    status VARCHAR,
    model_requested VARCHAR,
    model_served VARCHAR,
    role VARCHAR,
    parent_call_id VARCHAR,         -- lineage, as the exchange saw it
    stream BOOLEAN,
    delivered BOOLEAN,
    finish_reason VARCHAR,
    error VARCHAR,
    policy_version VARCHAR,
    sampling_requested VARCHAR,     -- JSON object
    sampling VARCHAR,               -- JSON object
    notes VARCHAR,                  -- JSON list
    usage VARCHAR,                  -- JSON object, as the engine counted
    started_at DOUBLE,
    first_token_at DOUBLE,
    ended_at DOUBLE,
    num_prompt INTEGER,
    prompt_parent_id VARCHAR,       -- storage only: whose prompt + completion begins this prompt
    prompt_shared INTEGER,          -- ... and for how many tokens

    http VARCHAR,                   -- JSON object: method, host, path, headers, status
    body_base_id VARCHAR,           -- the call whose bodies these were packed on top of
    request_body BLOB USING COMPRESSION uncompressed,   -- frames of polar_mitm/store/bodies.py
    upstream_body BLOB USING COMPRESSION uncompressed,
    response_body BLOB USING COMPRESSION uncompressed,
    pacing BLOB USING COMPRESSION uncompressed,         -- MessagePack: chunk sizes, milliseconds of each

    prompt_suffix INTEGER[],        -- the prompt after its first prompt_shared tokens
    completion_token_ids INTEGER[],
    behaviour_logprobs FLOAT[]      -- nats, one per completion token
);

-- Where a commit puts calls first, lists as text. A commit of list values logs every list of the same 2,048 rows
-- again, text it logs once. The recorder moves the rows to call_rows before each checkpoint.
CREATE TABLE call_log AS
SELECT * REPLACE (
    prompt_suffix::VARCHAR AS prompt_suffix,
    completion_token_ids::VARCHAR AS completion_token_ids,
    behaviour_logprobs::VARCHAR AS behaviour_logprobs
)
FROM call_rows;

CREATE TABLE rewards (
    rollout_id VARCHAR NOT NULL,
    name VARCHAR,
    value DOUBLE,
    verifier VARCHAR,
    evidence VARCHAR,
    "at" DOUBLE
);

CREATE TABLE egress (
    rollout_id VARCHAR NOT NULL,
    "at" DOUBLE,
    verdict VARCHAR,
    layer VARCHAR,
    name VARCHAR,
    detail VARCHAR
);

CREATE VIEW rollouts AS
SELECT * REPLACE (command::JSON::VARCHAR[] AS command) FROM rollout_rows;

CREATE VIEW stored_calls AS
FROM call_rows
UNION ALL
SELECT * REPLACE (
    prompt_suffix::INTEGER[] AS prompt_suffix,
    completion_token_ids::INTEGER[] AS completion_token_ids,
    behaviour_logprobs::FLOAT[] AS behaviour_logprobs
)
FROM call_log;

CREATE VIEW calls AS
SELECT * EXCLUDE (
    prompt_parent_id, prompt_shared, prompt_suffix,
    http, body_base_id, request_body, upstream_body, response_body, pacing
) REPLACE (notes::JSON::VARCHAR[] AS notes), len(completion_token_ids) AS num_sampled
FROM stored_calls;

CREATE VIEW wire AS
SELECT call_id, rollout_id, http::JSON AS http, body_base_id, request_body, upstream_body, response_body, pacing
FROM stored_calls;

-- Whole prompts. `walk` climbs from each call to the root of its storage chain; `need` says how many of a
-- node's prompt + completion tokens the call takes.
CREATE VIEW call_prompts AS
WITH RECURSIVE walk(call_id, rollout_id, node_id, need, depth) AS (
    SELECT call_id, rollout_id, call_id, num_prompt, 0 FROM stored_calls
    UNION ALL
    SELECT w.call_id, w.rollout_id, n.prompt_parent_id, least(w.need, n.prompt_shared), w.depth + 1
    FROM walk w JOIN stored_calls n ON n.call_id = w.node_id
    WHERE n.prompt_parent_id IS NOT NULL
)
SELECT w.call_id, w.rollout_id,
       flatten(list(list_slice(n.prompt_suffix || n.completion_token_ids, 1, greatest(0, w.need - n.prompt_shared))
                    ORDER BY w.depth DESC)) AS prompt_token_ids
FROM walk w JOIN stored_calls n ON n.call_id = w.node_id
GROUP BY w.call_id, w.rollout_id;

CREATE VIEW calls_full AS
SELECT c.*, p.prompt_token_ids
FROM calls c JOIN call_prompts p ON p.call_id = c.call_id;

-- One whole prompt, without the walk over every other call: SELECT prompt_token_ids FROM prompt_of('01J...').
CREATE MACRO prompt_of(id) AS TABLE
WITH RECURSIVE mine AS MATERIALIZED (
    SELECT call_id, num_prompt, prompt_parent_id, prompt_shared, prompt_suffix || completion_token_ids AS ids
    FROM stored_calls
    WHERE rollout_id = (SELECT any_value(rollout_id) FROM stored_calls WHERE call_id = id)
), walk(node_id, need, depth) AS (
    SELECT call_id, num_prompt, 0 FROM mine WHERE call_id = id
    UNION ALL
    SELECT n.prompt_parent_id, least(w.need, n.prompt_shared), w.depth + 1
    FROM walk w JOIN mine n ON n.call_id = w.node_id
    WHERE n.prompt_parent_id IS NOT NULL
)
SELECT id AS call_id,
       flatten(list(list_slice(n.ids, 1, greatest(0, w.need - n.prompt_shared)) ORDER BY w.depth DESC))
           AS prompt_token_ids
FROM walk w JOIN mine n ON n.call_id = w.node_id;
