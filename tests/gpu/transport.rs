//! Every way across a boundary, from every GPU to every GPU, itself included.

use std::sync::Arc;

use pipeline_infer::{
    backend::{
        DType,
        cuda::{Cuda, PipelineFacts},
    },
    transport::gpu_transports,
};

use crate::{common::crossing, device::gpus};

#[test]
fn every_transport_brings_what_was_sent_in_order_between_all_gpus() {
    let facts = PipelineFacts { dtype: DType::BF16, head_dim: 64, seats: 1 };
    let on = |i| Arc::new(Cuda::new(i, facts).unwrap_or_else(|e| panic!("opening cuda:{i}: {e}")));
    for from in 0..gpus() {
        for to in 0..gpus() {
            let (from, to) = (on(from), on(to));
            for transport in gpu_transports() {
                crossing::brings_what_was_sent_in_order(transport, &from, &to);
                crossing::tells_a_sender_without_a_receiver(transport, &from, &to);
            }
        }
    }
}
