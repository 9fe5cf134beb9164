//! Federated learning of ten clients with two digits each: FedAvg, posterior merging, PVI and IVON-ADMM.
use tch_blr::federated::*;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::federation::*;

fn main() -> tch_blr_examples::Outcome {
    let data = match std::env::var("H") {
        Ok(_) => Federation::handwritten()?,
        _ => Federation::mnist(&Digits::load()?),
    };
    let a: Vec<String> = std::env::args().skip(1).collect();
    let f = |i: usize| a[i].parse::<f64>().unwrap();
    let method: Method = serde_json::from_str(&a[0])?;
    let b = Budget { rounds: f(5) as usize, epochs: f(4) as u64, batch: 50, hidden: 50, samples: 8 };
    let p = Plan { name: "x", method, lr: f(1), prior_precision: f(2), temperature: f(3) };
    let t = std::time::Instant::now();
    match p.run(&data, &data.validation, &b, 100) {
        Ok(s) => {
            for x in s {
                print!(" {:.1}/{:.2}/{:.2}", 100. * x.accuracy, x.nll, x.predictive_nll);
            }
        }
        Err(e) => print!(" {e}"),
    }
    println!("   {a:?} {:.1} s", t.elapsed().as_secs_f64());
    Ok(())
}
