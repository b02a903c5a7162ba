//! A client of the Kubernetes container runtime interface (CRI), with which the tests do what a kubelet does.
//!
//! ```text
//! sandbox-cri SOCKET run-pod POD                     prints the pod's id
//! sandbox-cri SOCKET create ID POD CONTAINER         prints the container's id
//! sandbox-cri SOCKET start ID
//! sandbox-cri SOCKET exec ID SECONDS COMMAND…        prints output and errors, and ends with the exit code
//! sandbox-cri SOCKET stream-exec ID INPUT COMMAND…   the same over a connection, on which it writes INPUT as well
//! sandbox-cri SOCKET attach ID INPUT UNTIL           writes INPUT, prints output until it has UNTIL in it
//! sandbox-cri SOCKET tty-exec ID SIZE INPUT COMMAND… as stream-exec, on a terminal that is COLUMNSxROWS
//! sandbox-cri SOCKET tty-attach ID SIZE INPUT UNTIL  as attach, to a container that has a terminal
//! sandbox-cri SOCKET port-forward ID PORT INPUT      writes INPUT to a port of the pod, prints what comes back
//! sandbox-cri SOCKET status ID | pod-status ID | stats ID | image NAME     prints JSON
//! sandbox-cri SOCKET update ID LIMITS
//! sandbox-cri SOCKET stop ID | remove ID | stop-pod ID | remove-pod ID
//! ```
//!
//! POD, CONTAINER and LIMITS are JSON: see [`config`].

mod config;
mod stream;

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::*;
use serde::Serialize;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// How long a container has to end by itself, in seconds.
const STOP_SECONDS: i64 = 5;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run(args))) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("sandbox-cri: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn connect(socket: String) -> Result<Channel, Box<dyn Error>> {
    // The address is a formality: the connector knows where to go.
    let channel = Endpoint::try_from("http://containerd")?
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        }))
        .await?;
    Ok(channel)
}

async fn run(args: Vec<String>) -> Result<u8, Box<dyn Error>> {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let (socket, words) = words.split_first().ok_or("give a socket")?;
    let channel = connect((*socket).to_owned()).await?;
    let mut client = RuntimeServiceClient::new(channel.clone());
    match words {
        ["run-pod", pod] => {
            let pod: config::Pod = serde_json::from_str(pod)?;
            let request =
                RunPodSandboxRequest { runtime_handler: pod.handler.clone(), config: Some(pod.into()) };
            println!("{}", client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id);
        }
        ["create", id, pod, container] => {
            let request = CreateContainerRequest {
                pod_sandbox_id: (*id).into(),
                config: Some(serde_json::from_str::<config::Container>(container)?.into()),
                // It wants to know the pod's configuration again, for the directory of its logs.
                sandbox_config: Some(serde_json::from_str::<config::Pod>(pod)?.into()),
            };
            println!("{}", client.create_container(request).await?.into_inner().container_id);
        }
        ["start", id] => {
            client.start_container(StartContainerRequest { container_id: (*id).into() }).await?;
        }
        ["exec", id, seconds, command @ ..] => {
            let request = ExecSyncRequest {
                container_id: (*id).into(),
                cmd: owned(command),
                timeout: seconds.parse()?,
            };
            let done = client.exec_sync(request).await?.into_inner();
            std::io::stdout().write_all(&done.stdout)?;
            std::io::stderr().write_all(&done.stderr)?;
            return Ok(u8::try_from(done.exit_code)?);
        }
        ["stream-exec", id, input, command @ ..] => {
            let url = client.exec(exec(id, command, false)).await?.into_inner().url;
            return stream::converse(&url, None, input, None);
        }
        ["attach", id, input, until] => {
            let url = client.attach(attach(id, false)).await?.into_inner().url;
            return stream::converse(&url, None, input, Some(until));
        }
        ["tty-exec", id, size, input, command @ ..] => {
            let url = client.exec(exec(id, command, true)).await?.into_inner().url;
            return stream::converse(&url, Some(size), input, None);
        }
        ["tty-attach", id, size, input, until] => {
            let url = client.attach(attach(id, true)).await?.into_inner().url;
            return stream::converse(&url, Some(size), input, Some(until));
        }
        ["port-forward", id, port, input] => {
            let request = PortForwardRequest { pod_sandbox_id: (*id).into(), port: vec![port.parse()?] };
            let url = client.port_forward(request).await?.into_inner().url;
            stream::forward(&url, port, input)?;
        }
        ["status", id] => {
            let request = ContainerStatusRequest { container_id: (*id).into(), verbose: false };
            print(&client.container_status(request).await?.into_inner().status)?;
        }
        ["pod-status", id] => {
            let request = PodSandboxStatusRequest { pod_sandbox_id: (*id).into(), verbose: false };
            print(&client.pod_sandbox_status(request).await?.into_inner().status)?;
        }
        ["stats", id] => {
            let request = ContainerStatsRequest { container_id: (*id).into() };
            print(&client.container_stats(request).await?.into_inner().stats)?;
        }
        ["image", name] => {
            let image = Some(ImageSpec { image: (*name).into(), ..Default::default() });
            let request = ImageStatusRequest { image, verbose: false };
            print(&ImageServiceClient::new(channel).image_status(request).await?.into_inner().image)?;
        }
        ["update", id, limits] => {
            let request = UpdateContainerResourcesRequest {
                container_id: (*id).into(),
                linux: Some(serde_json::from_str::<config::Limits>(limits)?.into()),
                ..Default::default()
            };
            client.update_container_resources(request).await?;
        }
        ["stop", id] => {
            let request = StopContainerRequest { container_id: (*id).into(), timeout: STOP_SECONDS };
            client.stop_container(request).await?;
        }
        ["remove", id] => {
            client.remove_container(RemoveContainerRequest { container_id: (*id).into() }).await?;
        }
        ["stop-pod", id] => {
            client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: (*id).into() }).await?;
        }
        ["remove-pod", id] => {
            client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: (*id).into() }).await?;
        }
        words => return Err(format!("not understood: {words:?}").into()),
    }
    Ok(0)
}

fn exec(id: &str, command: &[&str], tty: bool) -> ExecRequest {
    // A terminal has one output.
    let (container_id, stderr) = (id.into(), !tty);
    ExecRequest { container_id, cmd: owned(command), stdin: true, stdout: true, stderr, tty }
}

fn attach(id: &str, tty: bool) -> AttachRequest {
    AttachRequest { container_id: id.into(), stdin: true, stdout: true, stderr: !tty, tty }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).into()).collect()
}

fn print(value: &impl Serialize) -> Result<(), Box<dyn Error>> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}
