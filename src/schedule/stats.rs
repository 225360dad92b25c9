//! What a scheduler tells of its queues and blocks.

/// Queues and KV blocks at a moment, and what was counted until then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct SchedulerStats {
    /// Sequences that wait to be admitted.
    pub waiting: usize,
    /// Sequences that have been admitted and have not ended.
    pub running: usize,
    /// All KV blocks.
    pub kv_blocks_total: usize,
    /// Those that nobody holds, with nothing in them that could be used again.
    pub kv_blocks_free: usize,
    /// Those that nobody holds, kept because a prompt may begin with what is in them.
    pub kv_blocks_cached: usize,
    /// Prompt tokens that were looked for among the blocks.
    pub prefix_lookup_tokens: u64,
    /// Those of them that were found.
    pub prefix_hit_tokens: u64,
    /// How often a sequence lost its blocks to be computed again.
    pub preemptions: u64,
    /// Steps that have been planned and not come back.
    pub in_flight: usize,
}
