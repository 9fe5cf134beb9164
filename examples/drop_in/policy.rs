//! A policy gradient (PPO) that learns to balance a pole on a cart.

use super::optimizer::{Job, Own, Trainer};
use super::program::{Plan, Program};
use super::scores::{Better, Measure, Scores};
use tch::nn::{self, LinearConfig, Module, OptimizerConfig, Path as Names, Sequential};
use tch::{Kind, Tensor};
use tch_blr::Result;
use tch_blr::nn::linear;
use tch_blr_examples::Outcome;
use tch_blr_examples::random::Rng;

/// Carts that are driven side by side, and steps of each in a round.
const CARTS: usize = 8;
const STEPS: usize = 128;
const ROUNDS: u64 = 60;
/// Passes over a round's transitions, and transitions in a mini-batch.
const EPOCHS: u64 = 4;
const BATCH: usize = 256;
const UPDATES: u64 = EPOCHS * (CARTS * STEPS / BATCH) as u64;

const DISCOUNT: f64 = 0.99;
/// λ of the generalized advantage estimate.
const TRACE: f64 = 0.95;
const CLIP: f64 = 0.2;

struct Policy;

pub(crate) fn program() -> Box<dyn Program> {
    Box::new(Policy)
}

/// A pole on a cart, which is pushed left or right with 10 N every 20 ms: a cart of 1 kg, a pole of 0.1 kg and 1 m, no
/// friction (Barto, Sutton and Anderson 1983). One point for every step until the cart is 2.4 m off, the pole 12°, or
/// 500 steps are done.
struct Cart {
    position: f64,
    speed: f64,
    angle: f64,
    spin: f64,
    steps: u64,
}

impl Cart {
    const LIMIT: u64 = 500;

    fn new(rng: &mut Rng) -> Self {
        let [position, speed, angle, spin] = std::array::from_fn(|_| rng.between(-0.05, 0.05));
        Cart { position, speed, angle, spin, steps: 0 }
    }

    fn push(&mut self, right: bool) {
        const GRAVITY: f64 = 9.8;
        const MASS: f64 = 1.1;
        const POLE: f64 = 0.1;
        const HALF: f64 = 0.5;
        const DT: f64 = 0.02;
        let force = if right { 10.0 } else { -10.0 };
        let (sin, cos) = self.angle.sin_cos();
        let pull = (force + POLE * HALF * self.spin.powi(2) * sin) / MASS;
        let turn = (GRAVITY * sin - cos * pull) / (HALF * (4.0 / 3.0 - POLE * cos * cos / MASS));
        let acceleration = pull - POLE * HALF * turn * cos / MASS;
        self.position += DT * self.speed;
        self.speed += DT * acceleration;
        self.angle += DT * self.spin;
        self.spin += DT * turn;
        self.steps += 1;
    }

    fn fallen(&self) -> bool {
        self.position.abs() > 2.4 || self.angle.abs() > 12_f64.to_radians()
    }

    fn done(&self) -> bool {
        self.fallen() || self.steps == Self::LIMIT
    }

    fn state(&self) -> [f32; 4] {
        [self.position, self.speed, self.angle, self.spin].map(|x| x as f32)
    }
}

fn states(carts: &[Cart]) -> Tensor {
    Tensor::from_slice2(&carts.iter().map(Cart::state).collect::<Vec<_>>())
}

struct Network {
    actor: Sequential,
    critic: Sequential,
}

impl Network {
    fn new(p: &Names) -> Self {
        let mlp = |name: &str, outputs| {
            let dense = |layer, from, to| linear(p / name / layer, from, to, LinearConfig::default());
            nn::seq().add(dense("hidden", 4, 64)).add_fn(Tensor::tanh).add(dense("out", 64, outputs))
        };
        Network { actor: mlp("actor", 2), critic: mlp("critic", 1) }
    }

    /// Log-probabilities of both actions, `[B, 2]`.
    fn actions(&self, states: &Tensor) -> Tensor {
        self.actor.forward(states).log_softmax(-1, Kind::Float)
    }

    fn values(&self, states: &Tensor) -> Tensor {
        self.critic.forward(states).squeeze_dim(-1)
    }

    /// Drawn from the policy: whether each cart is pushed to the right.
    fn act(&self, states: &Tensor, rng: &mut Rng) -> Result<Vec<bool>> {
        let right = tch::no_grad(|| self.actions(states)).select(1, 1).exp().to_kind(Kind::Double);
        Ok(Vec::<f64>::try_from(right)?.into_iter().map(|p| rng.unit() < p).collect())
    }

    /// The clipped objective of PPO (Schulman et al. 2017), the error of the values, and an entropy bonus.
    fn loss(&self, batch: &Round) -> Tensor {
        let log_p = self.actions(&batch.states);
        let ratio = (log_p.gather(1, &batch.actions.unsqueeze(1), false).squeeze_dim(1) - &batch.log_p).exp();
        let gain = (&ratio * &batch.advantages).minimum(&(ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * &batch.advantages));
        let error = (self.values(&batch.states) - &batch.returns).square();
        let entropy = -(log_p.exp() * &log_p).sum_dim_intlist(1, false, Kind::Float);
        (error * 0.5 - gain - entropy * 0.01).mean(Kind::Float)
    }
}

/// Transitions, each a row.
struct Round {
    states: Tensor,
    actions: Tensor,
    /// Of the actions, when they were chosen.
    log_p: Tensor,
    advantages: Tensor,
    returns: Tensor,
}

impl Round {
    fn drive(net: &Network, carts: &mut [Cart], rng: &mut Rng) -> Result<Self> {
        let (mut seen, mut actions, mut after) = (Vec::new(), Vec::new(), Vec::new());
        // 0 where nothing comes after the step; where only the time was up, the value of the last state does.
        let (mut alive, mut goes_on) = (Vec::new(), Vec::new());
        for _ in 0..STEPS {
            let now = states(carts);
            let pushes = net.act(&now, rng)?;
            for (cart, &right) in carts.iter_mut().zip(&pushes) {
                cart.push(right);
            }
            after.push(states(carts));
            for cart in carts.iter_mut() {
                alive.push(f64::from(u8::from(!cart.fallen())));
                goes_on.push(f64::from(u8::from(!cart.done())));
                if cart.done() {
                    *cart = Cart::new(rng);
                }
            }
            seen.push(now);
            actions.extend(pushes.into_iter().map(i64::from));
        }
        let (states, after) = (Tensor::cat(&seen, 0), Tensor::cat(&after, 0));
        let actions = Tensor::from_slice(&actions);
        let (log_p, values, next) = tch::no_grad(|| {
            let log_p = net.actions(&states).gather(1, &actions.unsqueeze(1), false).squeeze_dim(1);
            (log_p, net.values(&states), net.values(&after))
        });
        let [v, next] = [&values, &next].map(|t| Vec::<f64>::try_from(t.to_kind(Kind::Double)));
        let (v, next) = (v?, next?);
        let mut advantages = vec![0.0; v.len()];
        for i in (0..v.len()).rev() {
            let later = advantages.get(i + CARTS).map_or(0.0, |a| a * goes_on[i]);
            advantages[i] = 1.0 + DISCOUNT * alive[i] * next[i] - v[i] + DISCOUNT * TRACE * later;
        }
        let advantages = Tensor::from_slice(&advantages).to_kind(Kind::Float);
        let returns = &advantages + values;
        let advantages = (&advantages - advantages.mean(Kind::Float)) / (advantages.std(true) + 1e-8);
        Ok(Round { states, actions, log_p, advantages, returns })
    }

    fn rows(&self, rows: &Tensor) -> Round {
        let [states, actions, log_p, advantages, returns] =
            [&self.states, &self.actions, &self.log_p, &self.advantages, &self.returns]
                .map(|t| t.index_select(0, rows));
        Round { states, actions, log_p, advantages, returns }
    }

    fn learn(&self, net: &Network, opt: &mut Trainer, rng: &mut Rng) -> Result<()> {
        let mut order: Vec<i64> = (0..self.actions.size()[0]).collect();
        for _ in 0..EPOCHS {
            rng.shuffle(&mut order);
            for rows in order.chunks(BATCH) {
                let batch = self.rows(&Tensor::from_slice(rows));
                opt.step(|| net.loss(&batch))?;
            }
        }
        Ok(())
    }
}

/// Mean points of 20 new carts.
fn points(net: &Network, rng: &mut Rng) -> Result<f64> {
    let mut carts: Vec<Cart> = (0..20).map(|_| Cart::new(rng)).collect();
    while carts.iter().any(|cart| !cart.done()) {
        let pushes = net.act(&states(&carts), rng)?;
        for (cart, right) in carts.iter_mut().zip(pushes).filter(|(cart, _)| !cart.done()) {
            cart.push(right);
        }
    }
    Ok(carts.iter().map(|cart| cart.steps as f64).sum::<f64>() / carts.len() as f64)
}

impl Program for Policy {
    fn plan(&self) -> Plan {
        Plan {
            // All transitions that the training will see.
            examples: ROUNDS as usize * CARTS * STEPS,
            steps: ROUNDS * UPDATES,
            own: Own { build: |vs, lr| nn::Adam::default().build(vs, lr), lr: 3e-3, scheduled: false },
            adam_lr: 1e-2,
            without_vogn: None,
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let net = Network::new(&vs.root());
        let plan = self.plan();
        let mut opt = job.optimizer(&plan, &vs)?;
        let mut rng = Rng::new(job.seed, 2);
        let mut carts: Vec<Cart> = (0..CARTS).map(|_| Cart::new(&mut rng)).collect();
        for _ in 0..job.steps(&plan).div_ceil(UPDATES) {
            Round::drive(&net, &mut carts, &mut rng)?.learn(&net, &mut opt, &mut rng)?;
        }
        let points = points(&net, &mut rng)?;
        Ok(Scores::new([Measure::of_point("return", Better::Higher, points)], &[&opt]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-15, "{a} {b}");
    }

    /// From rest: the pole falls back with 10/1.1 / (½ (4/3 - 1/11)) rad/s², which pushes the cart on.
    #[test]
    fn a_push_by_hand() {
        let mut cart = Cart { position: 0.0, speed: 0.0, angle: 0.0, spin: 0.0, steps: 0 };
        cart.push(true);
        let turn = -(10.0 / 1.1) / (0.5 * (4.0 / 3.0 - 1.0 / 11.0));
        close(cart.spin, 0.02 * turn);
        close(cart.speed, 0.02 * (10.0 / 1.1 - 0.05 * turn / 1.1));
        assert_eq!((cart.position, cart.angle, cart.steps, cart.done()), (0.0, 0.0, 1, false));
        let speed = cart.speed;
        cart.push(false);
        close(cart.position, 0.02 * speed);
        assert!(cart.angle < 0.0 && cart.speed < speed);
    }

    #[test]
    fn ends() {
        let at = |position, degrees: f64, steps| {
            let cart = Cart { position, speed: 0.0, angle: degrees.to_radians(), spin: 0.0, steps };
            (cart.fallen(), cart.done())
        };
        assert_eq!(at(2.39, 11.9, 499), (false, false));
        assert_eq!(at(-2.41, 0.0, 9), (true, true));
        assert_eq!(at(0.0, -12.1, 9), (true, true));
        assert_eq!(at(0.0, 0.0, 500), (false, true));
    }
}
