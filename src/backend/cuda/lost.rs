//! GPUs that have failed in such a way that a process can do nothing more with them.
//!
//! What the other GPUs of the same pipeline have been given to do may wait for a lost one for ever, and freeing memory
//! waits for all that a GPU has been given. So from then on their memory is left to the end of the process.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicU64, Ordering::SeqCst},
};

use cudarc::driver::sys::CUresult;

/// GPUs, each a bit, that have worked together, by pipeline.
static PIPELINES: Mutex<Vec<u64>> = Mutex::new(Vec::new());
/// GPUs that are not to be waited for.
static ABANDONED: AtomicU64 = AtomicU64::new(0);

/// Whether a GPU has been lost in this process.
pub fn any() -> bool {
    ABANDONED.load(SeqCst) != 0
}

/// These GPUs will wait for each other.
pub(super) fn work_together(ordinals: &[usize]) {
    let all = ordinals.iter().fold(0, |all, &i| all | bit(i));
    let mut pipelines = PIPELINES.lock().unwrap_or_else(PoisonError::into_inner);
    if !pipelines.contains(&all) {
        pipelines.push(all);
    }
}

/// This GPU is lost, and with it those that may wait for it.
pub(super) fn lose(ordinal: usize) {
    let pipelines = PIPELINES.lock().unwrap_or_else(PoisonError::into_inner);
    ABANDONED.fetch_or(concerned(&pipelines, ordinal), SeqCst);
}

/// Whether what a GPU has been given to do may never end.
pub(super) fn is_abandoned(ordinal: usize) -> bool {
    ABANDONED.load(SeqCst) & bit(ordinal) != 0
}

/// Whether a driver's answer means that its context is of no use any more.
pub(super) fn ends_context(answer: CUresult) -> bool {
    use CUresult::*;
    matches!(
        answer,
        CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_EXTERNAL_DEVICE
            | CUDA_ERROR_UNKNOWN
    )
}

fn bit(ordinal: usize) -> u64 {
    // No machine has so many; those beyond are never given up.
    u32::try_from(ordinal).ok().and_then(|i| 1u64.checked_shl(i)).unwrap_or(0)
}

fn concerned(pipelines: &[u64], ordinal: usize) -> u64 {
    let lost = bit(ordinal);
    pipelines.iter().filter(|&all| all & lost != 0).fold(lost, |all, more| all | more)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_worked_with_a_lost_gpu_are_given_up_and_no_others() {
        let pipelines = [0b0011, 0b0110, 0b1_1000];
        assert_eq!(concerned(&pipelines, 0), 0b0011);
        assert_eq!(concerned(&pipelines, 1), 0b0111);
        assert_eq!(concerned(&pipelines, 4), 0b1_1000);
        assert_eq!(concerned(&pipelines, 6), 0b100_0000);
        assert_eq!((bit(63), bit(64), bit(usize::MAX)), (1 << 63, 0, 0));
    }

    #[test]
    fn what_can_be_tried_again_loses_nothing() {
        use CUresult::*;
        for answer in [CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_READY] {
            assert!(!ends_context(answer), "{answer:?}");
        }
        assert!(ends_context(CUDA_ERROR_ILLEGAL_ADDRESS) && ends_context(CUDA_ERROR_LAUNCH_FAILED));
    }
}
