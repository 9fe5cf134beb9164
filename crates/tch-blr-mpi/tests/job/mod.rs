//! A test that starts itself on several ranks: cargo's harness runs the parent, and each rank runs one ignored test of
//! the same program.

use std::process::Command;
use std::time::{Duration, Instant};

/// How a job has ended.
#[derive(Debug)]
pub struct Job {
    /// Of `mpirun`.
    pub code: i32,
    /// What all ranks have printed.
    pub stdout: String,
    pub stderr: String,
}

/// Time for a job that takes seconds. A test fails when it is over.
const LIMIT: Duration = Duration::from_secs(120);

impl Job {
    /// Runs the ignored test `child::name` on so many ranks, with environment variables.
    pub fn of(ranks: usize, name: &str, variables: &[(&str, &str)]) -> Job {
        let program = std::env::current_exe().unwrap();
        let mut command = mpirun(ranks);
        command.arg(program).args(["--exact", &format!("child::{name}"), "--ignored", "--nocapture"]);
        command.envs(variables.iter().copied());
        Job::run(&mut command)
    }

    fn run(command: &mut Command) -> Job {
        let begin = Instant::now();
        let out = command.output().expect("`timeout` of coreutils");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let job = Job { code: out.status.code().unwrap(), stdout: text(&out.stdout), stderr: text(&out.stderr) };
        assert!(begin.elapsed() < LIMIT, "not over after {LIMIT:?}\n{}\n{}", job.stdout, job.stderr);
        job
    }

    /// All ranks have passed.
    pub fn passes(&self, ranks: usize) {
        // Ranks write in between each other, but not within this.
        let passed = self.stdout.matches(" 1 passed; 0 failed").count();
        assert_eq!((self.code, passed), (0, ranks), "{}\n{}", self.stdout, self.stderr);
    }

    /// The job has failed, and its error output says so.
    pub fn fails(&self, code: Option<i32>, says: &[&str]) {
        assert!(code.map_or(self.code != 0, |code| self.code == code), "{}\n{}", self.code, self.stderr);
        for part in says {
            assert!(self.stderr.contains(part), "`{part}` is missing in\n{}\n{}", self.stdout, self.stderr);
        }
    }
}

/// Under a time limit, with more ranks than cores, as any user.
fn mpirun(ranks: usize) -> Command {
    let mut command = Command::new("timeout");
    let limit = LIMIT.as_secs().to_string();
    command.args(["--kill-after=5", &limit, "mpirun", "-np", &ranks.to_string()]);
    // Of Open MPI; other MPIs need none of this.
    command.envs([
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_hwloc_base_binding_policy", "none"),
        ("OMPI_MCA_mpi_yield_when_idle", "1"),
        // Containers may not let a process read the memory of another.
        ("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),
        ("OMP_NUM_THREADS", "1"),
    ]);
    command
}
