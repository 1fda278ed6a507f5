-- How calls continue each other and what they answered; trajectories as a table; seals.

ALTER TABLE rollout_rows ADD COLUMN keep_reasoning VARCHAR DEFAULT 'template';
ALTER TABLE rollout_rows ADD COLUMN forked_from VARCHAR;    -- <rollout_id>/<call_id> where a replay turned live

-- JSON object of what differs from its default: continuation, fallback, edits, policy_version_last,
-- replayed_from, tokenizer. One column, since each column costs every commit.
ALTER TABLE call_rows ADD COLUMN lineage VARCHAR;
ALTER TABLE call_rows ADD COLUMN answer BLOB;               -- what the engine said: zstd of a JSON object
ALTER TABLE call_log ADD COLUMN lineage VARCHAR;
ALTER TABLE call_log ADD COLUMN answer BLOB;

-- What `polar-mitm reconstruct --write` has built.
CREATE TABLE trajectory_rows (
    trajectory_no BIGINT NOT NULL,  -- key of trajectory_pages; rising
    trajectory_id VARCHAR NOT NULL, -- unique within a builder
    rollout_id VARCHAR NOT NULL,
    group_id VARCHAR,
    builder VARCHAR NOT NULL,
    role VARCHAR,
    num_tokens INTEGER,             -- T
    num_trained INTEGER,
    mask_runs INTEGER[],            -- lengths of the runs of equal loss_mask, the first one of zeros
    spans VARCHAR,                  -- JSON list of objects, the calls, root first
    policy_version_min VARCHAR,
    policy_version_max VARCHAR,
    built_at DOUBLE
);

-- The tokens of trajectories, cut evenly: DuckDB unpacks 2,048 rows at once, whatever their length.
CREATE TABLE trajectory_pages (
    trajectory_no BIGINT NOT NULL,
    page INTEGER NOT NULL,
    token_ids INTEGER[],
    trained_logprobs FLOAT[]        -- nats, of those of the page's tokens that train
);

-- The account of each build, one row per rollout and builder.
CREATE TABLE builds (
    rollout_id VARCHAR NOT NULL,
    builder VARCHAR NOT NULL,
    report VARCHAR,                 -- JSON object: the BuildReport
    built_at DOUBLE
);

-- One row per record of a sealed rollout; `chain` is the digest of this record's and all before it.
CREATE TABLE seals (
    rollout_id VARCHAR NOT NULL,
    position INTEGER NOT NULL,      -- 0 is the rollout itself
    kind VARCHAR NOT NULL,          -- rollout, call, reward, egress
    record_id VARCHAR NOT NULL,
    digest VARCHAR NOT NULL,        -- SHA-256 of the record
    chain VARCHAR NOT NULL,
    sealed_at DOUBLE
);

-- A view whose tables have changed must be made again.
CREATE OR REPLACE VIEW rollouts AS
SELECT * REPLACE (command::JSON::VARCHAR[] AS command) FROM rollout_rows;

CREATE OR REPLACE VIEW stored_calls AS
FROM call_rows
UNION ALL
SELECT * REPLACE (
    prompt_suffix::INTEGER[] AS prompt_suffix,
    completion_token_ids::INTEGER[] AS completion_token_ids,
    behaviour_logprobs::FLOAT[] AS behaviour_logprobs
)
FROM call_log;

CREATE OR REPLACE VIEW calls AS
SELECT * EXCLUDE (
    prompt_parent_id, prompt_shared, prompt_suffix,
    http, body_base_id, request_body, upstream_body, response_body, pacing, lineage, answer
) REPLACE (notes::JSON::VARCHAR[] AS notes),
    len(completion_token_ids) AS num_sampled,
    coalesce(lineage ->> 'continuation', 'none') AS continuation,
    lineage ->> 'fallback' AS fallback,
    coalesce((lineage -> 'edits')::VARCHAR[], []) AS edits,
    lineage ->> 'policy_version_last' AS policy_version_last,
    lineage ->> 'replayed_from' AS replayed_from,
    coalesce(lineage ->> 'tokenizer', '') AS tokenizer
FROM stored_calls;

CREATE OR REPLACE VIEW wire AS
SELECT call_id, rollout_id, http::JSON AS http, body_base_id, request_body, upstream_body, response_body, pacing,
       answer
FROM stored_calls;

CREATE OR REPLACE VIEW calls_full AS
SELECT c.*, p.prompt_token_ids
FROM calls c JOIN call_prompts p ON p.call_id = c.call_id;

CREATE VIEW trajectories AS
SELECT * EXCLUDE (mask_runs) REPLACE (
    json_transform(spans, '[{
        "call_id": "VARCHAR", "start": "INTEGER", "sampled_start": "INTEGER", "end": "INTEGER",
        "mask_reason": "VARCHAR", "truncated": "BOOLEAN", "policy_version": "VARCHAR",
        "policy_version_last": "VARCHAR"
    }]') AS spans
)
FROM trajectory_rows;

-- With token_ids [T], loss_mask [T], 1 where a sampled token trains, behaviour_logprobs [T] in nats, 0.0 elsewhere.
CREATE VIEW trajectories_full AS
SELECT t.*, p.token_ids,
    flatten(list_transform(m.mask_runs, lambda n, i: list_resize([]::UTINYINT[], n, (1 - i % 2)::UTINYINT)))
        AS loss_mask,
    flatten(list_transform(m.mask_runs, lambda n, i:
        CASE WHEN i % 2 = 1 THEN list_resize([]::FLOAT[], n, 0::FLOAT)
        ELSE list_slice(
            p.trained_logprobs,
            1 + list_sum(list_filter(m.mask_runs[:i], lambda m, j: j % 2 = 0)) - n,
            list_sum(list_filter(m.mask_runs[:i], lambda m, j: j % 2 = 0))
        ) END
    )) AS behaviour_logprobs
FROM trajectories t
JOIN trajectory_rows m ON m.trajectory_no = t.trajectory_no
JOIN (
    SELECT trajectory_no, flatten(list(token_ids ORDER BY page)) AS token_ids,
        flatten(list(trained_logprobs ORDER BY page)) AS trained_logprobs
    FROM trajectory_pages GROUP BY trajectory_no
) p ON p.trajectory_no = t.trajectory_no;
