//! Download from the hub.
