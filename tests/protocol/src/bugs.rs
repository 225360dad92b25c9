// Bugs that the check has to find: edits of the pipeline's files, each of a text that is there exactly once. Read by
// build.rs too. Whoever changes such a line and is told of it by the build brings the edit up to date.

pub struct Bug {
    pub name: &'static str,
    pub file: &'static str,
    /// What is there, and what is put in its place.
    pub edits: &'static [(&'static str, &'static str)],
}

pub const BUGS: &[Bug] = &[
    Bug {
        name: "packet_sent_before_its_event_is_recorded",
        file: "transport/peer.rs",
        edits: &[
            (
                "        // SAFETY: the entry has room",
                "        let full = entry.full.clone();
        self.full.send((step.clone(), entry, len)).map_err(|_| Error::Engine(String::new()))?;
        // SAFETY: the entry has room",
            ),
            ("len, &entry.full)? };", "len, &full)? };"),
            (
                "self.full.send((step, entry, len)).map_err(|_| Error::Engine(\"the next stage is gone\".into()))",
                "Ok(())",
            ),
        ],
    },
    Bug {
        name: "packet_read_without_a_wait",
        file: "transport/peer.rs",
        edits: &[("self.cuda.wait(&came.entry.full)?;", "")],
    },
    Bug {
        name: "entry_written_without_a_wait",
        file: "transport/peer.rs",
        edits: &[("if entry.used =>", "if false =>")],
    },
    Bug {
        name: "entry_given_back_before_its_event_is_recorded",
        file: "transport/peer.rs",
        edits: &[
            ("self.cuda.record_event(&entry.free)?;", "let event = entry.free.clone();"),
            (
                "let _ = self.free.send(entry);\n        Ok(())",
                "let _ = self.free.send(entry);\n        self.cuda.record_event(&event)",
            ),
        ],
    },
    Bug {
        name: "entry_given_back_before_it_is_copied_out",
        file: "transport/peer.rs",
        edits: &[
            (
                "self.cuda.wait(&came.entry.full)?;",
                "self.cuda.wait(&came.entry.full)?; self.cuda.record_event(&came.entry.free)?;",
            ),
            (
                "        self.cuda.record_event(&entry.free)?;\n        // The sender may",
                "        // The sender may",
            ),
        ],
    },
    Bug {
        name: "entry_never_given_back",
        file: "transport/peer.rs",
        edits: &[("let _ = self.free.send(entry);", "drop(entry);")],
    },
    Bug {
        name: "buffer_never_given_back",
        file: "transport/host.rs",
        edits: &[("let _ = self.free.send(numbers);", "drop(numbers);")],
    },
    Bug {
        name: "packet_read_by_the_processor_without_a_wait",
        file: "transport/pinned.rs",
        edits: &[("self.failed = self.end.wait(&mut entry).err();\n        self.came", "self.came")],
    },
    Bug {
        name: "entry_written_by_the_processor_without_a_wait",
        file: "transport/pinned.rs",
        edits: &[("self.failed = self.end.wait(&mut entry).err();\n            self.room", "self.room")],
    },
    Bug {
        name: "entry_given_to_the_processor_before_its_event_is_recorded",
        file: "transport/pinned.rs",
        edits: &[
            (
                "        self.end.cuda.record_event(&entry.done)?;\n        entry.used = true;",
                "        let event = entry.done.clone();\n        entry.used = true;",
            ),
            (
                "entry.used = true;\n        // The sender may be gone already; then nobody needs the entry.\n        let _ = self.end.to.send(entry);\n        Ok(())",
                "entry.used = true;\n        let _ = self.end.to.send(entry);\n        self.end.cuda.record_event(&event)",
            ),
        ],
    },
    Bug {
        name: "what_the_gpu_said_instead_of_a_packet_is_forgotten",
        file: "transport/pinned.rs",
        edits: &[(
            "        self.failed = self.end.wait(&mut entry).err();\n        self.came",
            "        let _ = self.end.wait(&mut entry);\n        self.came",
        )],
    },
    Bug {
        name: "token_word_sent_before_its_event",
        file: "pipeline/stage.rs",
        edits: &[
            (
                "let pending = self.decoder.sample(",
                "enqueued.tell(step.step);\n let pending = self.decoder.sample(",
            ),
            ("                enqueued.tell(step.step);\n                Some", "                Some"),
        ],
    },
    Bug {
        name: "first_stage_does_not_wait_for_the_word",
        file: "pipeline/token_edge.rs",
        edits: &[("while self.latest < step {", "while self.latest < step && false {")],
    },
    Bug {
        name: "first_device_does_not_wait_for_the_tokens",
        file: "pipeline/stage.rs",
        edits: &[("|after| self.backend.await_tokens(after))?", "|_| Ok(()))?")],
    },
    Bug {
        name: "stage_goes_on_after_a_failure",
        file: "pipeline/outcome.rs",
        edits: &[(".is_ok() && !failed\n    }\n}\n\nimpl<P: Send", ".is_ok()\n    }\n}\n\nimpl<P: Send")],
    },
    Bug {
        name: "neighbours_notice_a_failure_before_it_is_told",
        file: "pipeline/stage.rs",
        edits: &[
            ("    index: usize,\n    outcomes: Outcomes<B::Pending>,\n", "    index: usize,\n"),
            ("    probe: Probe<B>,\n}", "    probe: Probe<B>,\n    outcomes: Outcomes<B::Pending>,\n}"),
        ],
    },
    Bug {
        name: "boundary_goes_while_its_device_still_writes_to_it",
        file: "pipeline/stage.rs",
        edits: &[
            ("    decoder: Decoder<B>,\n    input: Input<B>,\n", "    input: Input<B>,\n"),
            ("    probe: Probe<B>,\n}", "    probe: Probe<B>,\n    decoder: Decoder<B>,\n}"),
        ],
    },
    Bug {
        name: "results_wait_for_their_own_end",
        file: "pipeline/outcome.rs",
        edits: &[("        drop(self.pending.take());\n", "")],
    },
    Bug {
        name: "failed_step_is_not_told",
        file: "pipeline/stage.rs",
        edits: &[(
            "Some(pending) => self.outcomes.tell(step, pending),",
            "Some(pending) => pending.is_ok_and(|p| self.outcomes.tell(step, Ok(p))),",
        )],
    },
    Bug {
        name: "a_neighbour_that_is_gone_is_waited_for",
        file: "transport/peer.rs",
        edits: &[(
            "full: full_out, free: free_in,",
            "full: full_out, free: { std::mem::forget(free_in.clone()); free_in },",
        )],
    },
];
