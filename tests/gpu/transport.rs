//! Every way across a boundary, from every GPU to every GPU, itself included.

use std::{
    io::Write,
    sync::{Arc, Mutex},
};

use pipeline_infer::{
    backend::{
        DType,
        cpu::Cpu,
        cuda::{Cuda, PipelineFacts},
    },
    transport::{Ends, Peer, Transport, down_transports, gpu_transports, up_transports},
};

use crate::{common::crossing, device::gpus};

#[test]
fn every_transport_brings_what_was_sent_in_order_between_all_gpus() {
    let facts = PipelineFacts { dtype: DType::BF16, head_dim: 64, seats: 1, in_flight: 1 };
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

#[test]
fn every_transport_brings_what_was_sent_in_order_between_gpus_and_the_processor() {
    let facts = PipelineFacts { dtype: DType::BF16, head_dim: 64, seats: 1, in_flight: 1 };
    let cpu = Arc::new(Cpu::new(Some(1)));
    for gpu in 0..gpus() {
        let gpu = Arc::new(Cuda::new(gpu, facts).unwrap_or_else(|e| panic!("opening cuda:{gpu}: {e}")));
        for transport in down_transports() {
            crossing::brings_what_was_sent_in_order(transport, &gpu, &cpu);
            crossing::tells_a_sender_without_a_receiver(transport, &gpu, &cpu);
        }
        for transport in up_transports() {
            crossing::brings_what_was_sent_in_order(transport, &cpu, &gpu);
            crossing::tells_a_sender_without_a_receiver(transport, &cpu, &gpu);
        }
    }
}

/// What is logged, as lines.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap().lines().map(String::from).collect()
    }
}

/// Peer boundaries whose self-test fails, and what they said when they were made.
struct Distrustful(Log);

impl Transport<Cuda> for Distrustful {
    fn name(&self) -> &'static str {
        "peer with a failing self-test"
    }

    fn connect(
        &self,
        from: Arc<Cuda>,
        to: Arc<Cuda>,
        depth: usize,
        len_max: usize,
    ) -> pipeline_infer::Result<Ends<Cuda>> {
        let log = self.0.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_ansi(false)
            .with_writer(move || log.clone())
            .finish();
        let connect = || Peer { distrust: true }.connect(from, to, depth, len_max);
        tracing::subscriber::with_default(subscriber, connect)
    }
}

#[test]
fn a_failed_self_test_means_the_way_through_the_host_and_a_warning() {
    if gpus() == 0 {
        return;
    }
    let facts = PipelineFacts { dtype: DType::BF16, head_dim: 64, seats: 1, in_flight: 1 };
    for to in [0, gpus() - 1] {
        let [from, to] = [0, to].map(|i| Arc::new(Cuda::new(i, facts).unwrap()));
        let transport = Distrustful(Log::default());
        crossing::brings_what_was_sent_in_order(&transport, &from, &to);
        let lines = transport.0.lines();
        let warnings: Vec<_> = lines.iter().filter(|line| line.contains("WARN")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains("they go through the host"), "{lines:?}");
        assert!(warnings[0].contains("made to fail") && warnings[0].contains("cuda:0"), "{lines:?}");
    }
}
