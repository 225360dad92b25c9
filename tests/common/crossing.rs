//! What every way across a boundary promises.

use std::sync::Arc;

use pipeline_infer::{
    backend::Backend,
    batch::{MicroBatch, Step},
    transport::{Closed, Transport},
};

fn packet(step: u64) -> Step {
    Step { step, after: None, batch: Arc::new(MicroBatch::default()) }
}

/// Packets of many lengths through a boundary of three buffers, the sender's buffer spoilt after each.
pub(crate) fn brings_what_was_sent_in_order<A: Backend, B: Backend>(
    transport: &dyn Transport<A, B>,
    from: &Arc<A>,
    to: &Arc<B>,
) {
    const LEN: usize = 1000;
    let name = transport.name();
    let len = |step: u64| 1 + (step as usize * 37) % LEN;
    let numbers =
        move |step: u64| (0..len(step)).map(|i| step as f32 + i as f32 / LEN as f32).collect::<Vec<f32>>();
    let (mut sender, mut receiver) = transport.connect(from.clone(), to.clone(), 3, LEN).unwrap();
    let theirs = from.clone();
    let sending = std::thread::spawn(move || {
        let mut hidden = theirs.buf(LEN).unwrap();
        for step in 0..200u64 {
            theirs.write(&mut hidden, &numbers(step)).unwrap();
            sender.wait_for_room().unwrap();
            sender.send(packet(step), &hidden, len(step)).unwrap();
            // What was sent must not change with the buffer.
            theirs.write(&mut hidden, &[f32::NAN; LEN]).unwrap();
        }
    });
    let mut hidden = to.buf(LEN).unwrap();
    for step in 0..200u64 {
        assert_eq!(receiver.wait().unwrap().step, step, "{name}");
        receiver.take(&mut hidden).unwrap();
        let mut came = vec![0.0; len(step)];
        to.read(&mut came, &hidden).unwrap();
        receiver.give_back().unwrap();
        assert_eq!(came, numbers(step), "{name}, step {step}");
    }
    sending.join().unwrap();
    assert_eq!(receiver.wait().err(), Some(Closed), "{name}: the end of the sender is seen");
}

pub(crate) fn tells_a_sender_without_a_receiver<A: Backend, B: Backend>(
    transport: &dyn Transport<A, B>,
    from: &Arc<A>,
    to: &Arc<B>,
) {
    let (mut sender, receiver) = transport.connect(from.clone(), to.clone(), 1, 4).unwrap();
    drop(receiver);
    let hidden = from.buf(4).unwrap();
    let sent = sender
        .wait_for_room()
        .map_err(|_| ())
        .and_then(|()| sender.send(packet(0), &hidden, 4).map_err(|_| ()));
    assert!(sent.is_err(), "{}", transport.name());
}
