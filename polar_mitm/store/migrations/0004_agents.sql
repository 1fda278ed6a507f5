-- Which sub-agent makes a call. It is in the column `lineage` of call_rows, with what else only some calls have.

ALTER TABLE trajectory_rows ADD COLUMN agent_id VARCHAR;    -- of its last call, as `role` is

-- A view whose tables have changed must be made again.
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
    coalesce(lineage ->> 'tokenizer', '') AS tokenizer,
    lineage ->> 'agent_id' AS agent_id
FROM stored_calls;

CREATE OR REPLACE VIEW calls_full AS
SELECT c.*, p.prompt_token_ids
FROM calls c JOIN call_prompts p ON p.call_id = c.call_id;

CREATE OR REPLACE VIEW trajectories AS
SELECT * EXCLUDE (mask_runs) REPLACE (
    json_transform(spans, '[{
        "call_id": "VARCHAR", "start": "INTEGER", "sampled_start": "INTEGER", "end": "INTEGER",
        "mask_reason": "VARCHAR", "truncated": "BOOLEAN", "policy_version": "VARCHAR",
        "policy_version_last": "VARCHAR"
    }]') AS spans
)
FROM trajectory_rows;

-- With token_ids [T], loss_mask [T], 1 where a sampled token trains, behaviour_logprobs [T] in nats, 0.0 elsewhere.
CREATE OR REPLACE VIEW trajectories_full AS
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
