-- A logged call becomes one JSON object: what a commit of one row costs is its columns.

INSERT INTO call_rows BY NAME
SELECT * REPLACE (
    prompt_suffix::INTEGER[] AS prompt_suffix,
    completion_token_ids::INTEGER[] AS completion_token_ids,
    behaviour_logprobs::FLOAT[] AS behaviour_logprobs
)
FROM call_log;

DROP TABLE call_log;

-- Where a commit puts calls first: JSON objects with the columns of call_rows, BLOBs in base64. The recorder moves
-- them to call_rows before each checkpoint. A value that its column cannot hold reads as NULL: one odd record must
-- not make a store unreadable.
CREATE TABLE call_log (record VARCHAR NOT NULL);

CREATE VIEW logged_calls AS
SELECT * REPLACE (
    from_base64(request_body) AS request_body,
    from_base64(upstream_body) AS upstream_body,
    from_base64(response_body) AS response_body,
    from_base64(pacing) AS pacing,
    from_base64(answer) AS answer
)
FROM (
    SELECT unnest(json_transform(record, '{
        "call_id": "VARCHAR", "rollout_id": "VARCHAR", "seq": "BIGINT", "dialect": "VARCHAR", "route": "VARCHAR",
        "status": "VARCHAR", "model_requested": "VARCHAR", "model_served": "VARCHAR", "role": "VARCHAR",
        "parent_call_id": "VARCHAR", "stream": "BOOLEAN", "delivered": "BOOLEAN", "finish_reason": "VARCHAR",
        "error": "VARCHAR", "policy_version": "VARCHAR", "sampling_requested": "VARCHAR", "sampling": "VARCHAR",
        "notes": "VARCHAR", "usage": "VARCHAR", "started_at": "DOUBLE", "first_token_at": "DOUBLE",
        "ended_at": "DOUBLE", "num_prompt": "INTEGER", "prompt_parent_id": "VARCHAR", "prompt_shared": "INTEGER",
        "http": "VARCHAR", "body_base_id": "VARCHAR", "request_body": "VARCHAR", "upstream_body": "VARCHAR",
        "response_body": "VARCHAR", "pacing": "VARCHAR", "prompt_suffix": ["INTEGER"],
        "completion_token_ids": ["INTEGER"], "behaviour_logprobs": ["FLOAT"], "lineage": "VARCHAR",
        "answer": "VARCHAR"
    }'))
    FROM call_log
);

CREATE OR REPLACE VIEW stored_calls AS
FROM call_rows
UNION ALL BY NAME
FROM logged_calls;
