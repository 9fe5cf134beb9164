//! How long a step of many ranks takes: a simulation of the messages by which a ring of them adds up a buffer.

use crate::random::Rng;

/// What a step of one rank costs. Times in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Evaluation and update, on average.
    pub compute: f64,
    /// Standard deviation of `compute` from rank to rank and step to step, relative to it.
    pub jitter: f64,
    /// Bytes of the buffer that is summed.
    pub bytes: f64,
}

/// What a message costs.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    /// Bytes per second in each direction.
    pub bandwidth: f64,
    /// From one rank to its neighbour, of a message without length, in seconds.
    pub latency: f64,
}

impl Step {
    /// compute + 2(R-1)/R · bytes/bandwidth + (2(R-1) + 2 log₂ R) · latency: of ranks that are all equally fast. The
    /// logarithm is of the meeting before, whose few numbers go up and down a tree.
    pub fn expected(self, link: Link, ranks: usize) -> f64 {
        let r = ranks as f64;
        let hops = 2.0 * (r - 1.0) + 2.0 * r.log2().ceil();
        self.compute + 2.0 * (r - 1.0) / r * self.bytes / link.bandwidth + hops * link.latency
    }

    /// When the last of R ranks has the sum. Each begins when it has computed. All wait at the meeting for the slowest; then
    /// a part of the buffer goes round, R-1 times to be added to and R-1 times to be handed out, and no rank can pass on
    /// what has not come.
    pub fn simulated(self, link: Link, ranks: usize, rng: &mut Rng) -> f64 {
        let compute = |rng: &mut Rng| self.compute * (1.0 + self.jitter * rng.normal()).max(0.0);
        let slowest = (0..ranks).map(|_| compute(rng)).fold(0.0, f64::max);
        let met = slowest + 2.0 * (ranks as f64).log2().ceil() * link.latency;
        let mut now = vec![met; ranks];
        for _ in 0..2 * (ranks - 1) {
            // Latency varies as well, and one late message is late for all behind it.
            let message = |rng: &mut Rng| {
                self.bytes / ranks as f64 / link.bandwidth + link.latency * (1.0 + 0.2 * rng.normal()).max(0.1)
            };
            let sent: Vec<f64> = now.iter().map(|t| t + message(rng)).collect();
            for (rank, t) in now.iter_mut().enumerate() {
                *t = sent[rank].max(sent[(rank + ranks - 1) % ranks]);
            }
        }
        now.into_iter().fold(0.0, f64::max)
    }

    /// Bytes over 2·bandwidth, but not for latency: the `compute` at which communication is half of a step of many ranks.
    pub fn half(self, link: Link) -> f64 {
        2.0 * self.bytes / link.bandwidth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIGABIT: f64 = 1e9 / 8.0;

    #[test]
    fn equal_ranks_take_what_the_formula_says() {
        let step = Step { compute: 0.1, jitter: 0.0, bytes: 1e8 };
        for ranks in [2, 3, 8, 100] {
            let link = Link { bandwidth: 10.0 * GIGABIT, latency: 0.0 };
            let (found, expected) = (step.simulated(link, ranks, &mut Rng::new(0, 0)), step.expected(link, ranks));
            assert!((found / expected - 1.0).abs() < 1e-12, "{ranks}: {found} {expected}");
        }
        // By hand: 0.1 + 2·½·0.08.
        let link = Link { bandwidth: 10.0 * GIGABIT, latency: 0.0 };
        assert!((step.expected(link, 2) - 0.18).abs() < 1e-12 && (step.half(link) - 0.16).abs() < 1e-12);
        let alone = Link { bandwidth: 1.0, latency: 1.0 };
        assert_eq!((step.expected(alone, 1), step.simulated(alone, 1, &mut Rng::new(0, 0))), (0.1, 0.1));
    }

    #[test]
    fn all_wait_for_the_slowest() {
        // The mean of the largest of 64 standard normals is 2.36.
        let step = Step { compute: 1.0, jitter: 0.05, bytes: 0.0 };
        let link = Link { bandwidth: 1.0, latency: 0.0 };
        let mut rng = Rng::new(1, 0);
        let mean = (0..400).map(|_| step.simulated(link, 64, &mut rng)).sum::<f64>() / 400.0;
        // Its standard deviation is some 0.02, and of the mean of 400 a twentieth.
        assert!((mean - 1.118).abs() < 0.005, "{mean}");
    }
}
