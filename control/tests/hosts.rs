//! The EDS file beside the list, and the two files that come with the project.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pd_core::wire::Role;
use serde_json::Value;

use crate::support::*;

/// Ports of the hosts in an EDS file.
fn ports(path: &Path) -> BTreeSet<u64> {
    let value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(value["resources"][0]["cluster_name"], "engines");
    let hosts = value["resources"][0]["endpoints"][0]["lb_endpoints"].as_array().unwrap();
    hosts.iter().map(|host| host["endpoint"]["address"]["socket_address"]["port_value"].as_u64().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_host_is_in_the_file_before_filters_hear_of_it_and_a_gone_one_after() {
    let rig = Rig::start_with(&endpoints(&[(1, 1.0), (2, 1.0)]), with_eds).await;
    let eds = rig.directory.path().join("eds.json");
    assert_eq!(ports(&eds), [1, 2].into());
    let mut filter = rig.filter().await;
    replace(&rig.file(), &endpoints(&[(1, 1.0), (3, 1.0)])).unwrap();
    filter.poll(&rig.client, PATIENCE).await.unwrap();
    assert!(!filter.table.contains_key("127.0.0.1:2"));
    assert_eq!(ports(&eds), [1, 2, 3].into());
    until_true("the host that left is gone", || async { ports(&eds) == [1, 3].into() }).await;
    // A write is counted once it is done.
    until_true("three writes", || async { rig.client.metric("pd_control_eds_writes_total").await == 3.0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_file_is_left_alone_while_the_hosts_stay_the_same() {
    let rig = Rig::start_with(&four(1.0), with_eds).await;
    let mut filter = rig.filter().await;
    let inode = || fs::metadata(rig.directory.path().join("eds.json")).unwrap().ino();
    let before = inode();
    replace(&rig.file(), &four(2.0)).unwrap();
    filter.until_weight(&rig.client, 2.0).await;
    assert_eq!((inode(), rig.client.metric("pd_control_eds_writes_total").await), (before, 1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_an_earlier_run_left_are_dropped_at_the_start() {
    let rig = Rig::start_with(&four(1.0), |config, root| {
        with_eds(config, root);
        fs::write(
            root.join("eds.json"),
            pd_control::publish::eds::render("engines", &["10.0.0.1:9".parse().unwrap()].into()),
        )
        .unwrap();
    })
    .await;
    assert_eq!(ports(&rig.directory.path().join("eds.json")), [1, 2, 3, 4].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_written_delays_no_filter_and_is_tried_again() {
    let rig = Rig::start_with(&four(1.0), |config, root| {
        fs::create_dir(root.join("envoy")).unwrap();
        with_eds(config, &root.join("envoy"));
    })
    .await;
    let mut filter = rig.filter().await;
    let directory = rig.directory.path().join("envoy");
    fs::remove_dir_all(&directory).unwrap();
    replace(&rig.file(), &endpoints(&[(1, 2.0), (7, 1.0)])).unwrap();
    filter.until_weight(&rig.client, 2.0).await;
    assert_eq!(rig.client.metric("pd_control_eds_errors_total").await, 1.0);
    fs::create_dir(&directory).unwrap();
    until_true("the file is back", || async { directory.join("eds.json").exists() }).await;
    assert_eq!(ports(&directory.join("eds.json")), [1, 7].into());
}

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../envoy").join(name)
}

#[test]
fn the_shipped_list_has_two_of_each_role() {
    let path = shipped("endpoints.yaml");
    let list = pd_control::sources::file::endpoints::parse(&path, &fs::read(&path).unwrap()).unwrap();
    let endpoints: Vec<_> = list.as_slice().iter().map(|e| (e.address.to_string(), e.role)).collect();
    let expected = [(8100, Role::Prefill), (8101, Role::Prefill), (8200, Role::Decode), (8201, Role::Decode)];
    assert_eq!(endpoints, expected.map(|(port, role)| (format!("127.0.0.1:{port}"), role)));
}

#[test]
fn the_shipped_hosts_are_what_is_written_for_the_shipped_list() {
    let path = shipped("endpoints.yaml");
    let list = pd_control::sources::file::endpoints::parse(&path, &fs::read(&path).unwrap()).unwrap();
    let text = pd_control::publish::eds::render("engines", &pd_control::publish::eds::hosts(list.as_slice()));
    assert_eq!(fs::read_to_string(shipped("eds.json")).unwrap(), text);
}
