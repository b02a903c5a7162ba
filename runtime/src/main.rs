//! The program `sandbox`: see [`sandbox_runtime::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(sandbox_runtime::cli::main(std::env::args_os()))
}
