//! One small file an architecture.
