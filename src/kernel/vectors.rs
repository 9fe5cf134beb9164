//! Run-time choice of the width of vector instructions.
//!
//! A published crate is compiled for the oldest CPU of its architecture. What should use newer instructions is compiled
//! once per width, and the CPU decides which copy runs.
#![allow(unsafe_code)]

use std::sync::LazyLock;

/// A computation that is compiled once per width of vectors; `run` must be inlined for that.
pub(super) trait Vectorized {
    type Output;
    fn run(self) -> Self::Output;
}

/// Sets of instructions, in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Width {
    /// What every CPU of the architecture has: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Limits the width, as `ATEN_CPU_CAPABILITY` does in libtorch: `default`, `avx2` or `avx512`.
const LIMIT: &str = "TCH_BLR_CPU_CAPABILITY";

impl Width {
    /// The widest that this CPU has.
    fn of_cpu() -> Width {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            // All four: the copy is compiled for all of them, and the CPU must not meet an instruction that it lacks.
            if has!("avx512f") && has!("avx512vl") && has!("avx512dq") && has!("avx512bw") {
                return Width::Avx512;
            }
            if has!("avx2") {
                return Width::Avx2;
            }
        }
        Width::Baseline
    }

    /// Every width that this CPU has.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Width> {
        #[cfg(target_arch = "x86_64")]
        let every = [Width::Baseline, Width::Avx2, Width::Avx512];
        #[cfg(not(target_arch = "x86_64"))]
        let every = [Width::Baseline];
        every.into_iter().filter(|w| *w <= Width::of_cpu()).collect()
    }

    /// The widest that this CPU has and the environment allows.
    pub(super) fn chosen() -> Width {
        // Once, since reading the environment takes a lock and the choice must not change within a step.
        static CHOSEN: LazyLock<Width> = LazyLock::new(|| {
            let limit = match std::env::var(LIMIT).as_deref() {
                Ok("default") => Width::Baseline,
                #[cfg(target_arch = "x86_64")]
                Ok("avx2") => Width::Avx2,
                // As in libtorch, any other value sets no limit.
                _ => Width::of_cpu(),
            };
            limit.min(Width::of_cpu())
        });
        *CHOSEN
    }

    /// Whether 32 registers of 64 bytes are there.
    pub(super) fn has_many_registers(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Width::Avx512;
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Runs a computation with vectors of this width, which the CPU must have.
    pub(super) fn run<V: Vectorized>(self, v: V) -> V::Output {
        #[cfg(target_arch = "x86_64")]
        {
            // AVX-512 brings fused multiply-add along, but rustc does not contract a product and a sum by itself, so
            // that all widths round alike.
            #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
            fn avx512<V: Vectorized>(v: V) -> V::Output {
                v.run()
            }
            #[target_feature(enable = "avx2")]
            fn avx2<V: Vectorized>(v: V) -> V::Output {
                v.run()
            }
            debug_assert!(self <= Width::of_cpu());
            match self {
                // SAFETY: a width other than the baseline comes from `of_cpu`, so that the CPU has the instructions.
                Width::Avx512 => return unsafe { avx512(v) },
                // SAFETY: as above.
                Width::Avx2 => return unsafe { avx2(v) },
                Width::Baseline => {}
            }
        }
        v.run()
    }
}
