use super::*;

fn minimal() -> VmConfig {
    serde_json::from_value(serde_json::json!({
        "kernel": "/k", "image": "/i", "memory_mib": 64, "vcpus": 1, "control_socket": "/s"
    }))
    .unwrap()
}

fn message(change: impl FnOnce(&mut VmConfig)) -> String {
    let mut wire = minimal();
    change(&mut wire);
    Config::check(wire).unwrap_err().to_string()
}

fn share(path: &str) -> ShareEntry {
    ShareEntry { path: path.into(), source: "/x".into(), read_only: true, id_map: None }
}

#[test]
fn a_minimal_configuration_is_taken() {
    let config = Config::check(minimal()).unwrap();
    assert_eq!(config.memory_bytes(), 64 << 20);
    assert_eq!(config.device_count(), 1);
}

#[test]
fn numbers_out_of_range_are_named() {
    assert_eq!(message(|c| c.memory_mib = 1), "memory_mib is 1: it must be from 48 to 1048576");
    assert_eq!(message(|c| c.vcpus = 0), "vcpus is 0: it must be from 1 to 254");
    assert!(
        message(|c| c.vsock = Some(VsockConfig { cid: 2, socket: "/v".into() })).starts_with("vsock.cid")
    );
}

#[test]
fn unknown_fields_and_long_input_are_refused() {
    let unknown = Config::read(&br#"{"kernal": "/k"}"#[..]).unwrap_err().to_string();
    assert!(unknown.contains("kernal"), "{unknown}");
    let endless = std::io::repeat(b' ');
    assert!(matches!(Config::read(endless), Err(ConfigError::TooLong)));
}

#[test]
fn the_command_line_is_printable() {
    assert!(message(|c| c.cmdline = "a\nb".into()).starts_with("cmdline"));
    assert!(message(|c| c.cmdline = "x".repeat(2000)).starts_with("cmdline"));
}

#[test]
fn share_paths_are_plain_and_apart() {
    for path in ["", "/a", "a/../b", "../a", "./a"] {
        assert!(message(|c| c.shares = vec![share(path)]).starts_with("shares"), "{path}");
    }
    assert!(message(|c| c.shares = vec![share("a"), share("a")]).contains("twice"));
    assert!(message(|c| c.shares = vec![share("a/b"), share("a")]).contains("inside"));
    let mut wire = minimal();
    wire.shares = vec![share("a/b"), share("a/c")];
    assert!(Config::check(wire).is_ok());
}

#[test]
fn mac_addresses_are_those_of_one_host() {
    assert_eq!(parse_mac("02:00:00:0a:0B:ff"), Some(MacAddress([2, 0, 0, 10, 11, 255])));
    for bad in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:00:00",
        "01:00:00:00:00:01",
        "+2:00:00:00:00:01",
        "2:0:0:0:0:1",
    ] {
        assert_eq!(parse_mac(bad), None, "{bad}");
    }
    assert_eq!(parse_mac("00:00:00:00:00:00"), None);
}

#[test]
fn interface_names_are_checked() {
    for tap in ["", "..", "a/b", "a b", "sixteen-letters-"] {
        let net = NetConfig { tap: TapSource::Name(tap.into()), mac: "02:00:00:00:00:01".into() };
        assert!(message(|c| c.nets = vec![net.clone()]).contains("interface"), "{tap}");
    }
}

#[test]
fn a_tap_is_inherited_under_a_number_of_its_own() {
    let net = |fd| NetConfig { tap: TapSource::Descriptor(fd), mac: "02:00:00:00:00:01".into() };
    for fds in [&[3][..], &[-1], &[4, 5, 4]] {
        let nets: Vec<_> = fds.iter().copied().map(net).collect();
        assert!(message(|c| c.nets = nets).contains("has another use"), "{fds:?}");
    }
    let mut wire = minimal();
    wire.nets = vec![net(4), net(5)];
    Config::check(wire).unwrap();
}

#[test]
fn devices_are_counted() {
    let disk = DiskConfig { path: "/d".into(), read_only: true };
    assert!(message(|c| c.disks = vec![disk.clone(); 19]).contains("20 devices"));
}
