//! The ways in which people and programs change a file.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::time::Duration;

use axum::http::StatusCode;

use crate::support::*;

/// Long enough for a wrong answer to arrive, short enough to wait for.
const MOMENT: Duration = Duration::from_millis(200);

#[tokio::test(flavor = "multi_thread")]
async fn writing_in_place_renaming_over_and_saving_like_an_editor_are_seen() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    fs::write(rig.file(), four(2.0)).unwrap();
    filter.until_weight(&rig.client, 2.0).await;
    replace(&rig.file(), &four(3.0)).unwrap();
    filter.until_weight(&rig.client, 3.0).await;
    // vim with a backup: the old file moves away, a new one takes its place.
    fs::rename(rig.file(), rig.directory.path().join("endpoints.yaml~")).unwrap();
    fs::write(rig.file(), four(4.0)).unwrap();
    filter.until_weight(&rig.client, 4.0).await;
    // sed -i, several times in a row.
    for weight in [5.0, 6.0, 7.0] {
        replace(&rig.file(), &four(weight)).unwrap();
    }
    filter.until_weight(&rig.client, 7.0).await;
    assert_eq!(rig.client.metric("pd_control_refusals_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_link_swap_of_a_mounted_config_map_is_seen() {
    let rig = Rig::start_with(&four(9.0), |config, root| {
        let volume = root.join("volume");
        for (name, weight) in [("..1", 1.0), ("..2", 2.0), ("..3", 3.0)] {
            fs::create_dir_all(volume.join(name)).unwrap();
            fs::write(volume.join(name).join("endpoints.yaml"), four(weight)).unwrap();
        }
        symlink("..1", volume.join("..data")).unwrap();
        symlink("..data/endpoints.yaml", volume.join("endpoints.yaml")).unwrap();
        config.endpoints = Some(volume.join("endpoints.yaml"));
    })
    .await;
    let volume = rig.directory.path().join("volume");
    let mut filter = rig.filter().await;
    assert_eq!(filter.table["127.0.0.1:1"], 1.0);
    for (name, old, weight) in [("..2", "..1", 2.0), ("..3", "..2", 3.0)] {
        symlink(name, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
        fs::remove_dir_all(volume.join(old)).unwrap();
        filter.until_weight(&rig.client, weight).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_followed_to_where_the_file_is_edited() {
    let rig = Rig::start_with(&four(9.0), |config, root| {
        fs::create_dir(root.join("real")).unwrap();
        fs::write(root.join("real/list.yaml"), four(1.0)).unwrap();
        symlink("real/list.yaml", root.join("link.yaml")).unwrap();
        config.endpoints = Some(root.join("link.yaml"));
    })
    .await;
    let mut filter = rig.filter().await;
    fs::write(rig.directory.path().join("real/list.yaml"), four(2.0)).unwrap();
    filter.until_weight(&rig.client, 2.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_file_is_never_published_even_if_it_parses() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    let mut file = fs::File::create(rig.file()).unwrap();
    file.write_all(endpoints(&[(1, 2.0), (2, 1.0)]).as_bytes()).unwrap();
    assert_eq!(filter.poll(&rig.client, MOMENT).await, None);
    file.write_all(b"- {address: 127.0.0.1:3, role: both}\n").unwrap();
    drop(file);
    let snapshot = filter.poll(&rig.client, PATIENCE).await.unwrap();
    assert_eq!((snapshot.version, filter.table.len()), (2, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_never_closes_is_read_once_it_pauses() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    let mut file = fs::File::create(rig.file()).unwrap();
    file.write_all(four(2.0).as_bytes()).unwrap();
    filter.until_weight(&rig.client, 2.0).await;
    drop(file);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_is_refused_with_its_line_and_the_old_list_stays() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    fs::write(rig.file(), four(1000.0)).unwrap();
    until_true("the file is refused", || async { rig.client.metric("pd_control_refusals_total").await == 1.0 }).await;
    let reason = format!("{}:2:46: endpoints[0].weight: must be between 0.01 and 100", rig.file().display());
    let ready = rig.client.get("/readyz").await;
    assert_eq!((ready.status, ready.body), (StatusCode::OK, format!("degraded: {reason}\n")));
    let view: serde_json::Value = serde_json::from_str(&rig.client.get("/v1/endpoints").await.body).unwrap();
    assert_eq!((&view["degraded"], &view["version"]), (&reason.into(), &1.into()));
    assert_eq!(rig.client.metric("pd_control_degraded").await, 1.0);
    assert_eq!(filter.poll(&rig.client, Duration::ZERO).await, None);
    assert_eq!(Filter::default().poll(&rig.client, PATIENCE).await.unwrap().endpoints.len(), 4);

    // The same content once more is no second refusal, other bad content is.
    fs::write(rig.file(), four(1000.0)).unwrap();
    fs::write(rig.file(), "endpoints: [").unwrap();
    until_true("the file is refused", || async { rig.client.metric("pd_control_refusals_total").await == 2.0 }).await;

    // Back to what is in force: nothing to push, but all is well.
    fs::write(rig.file(), four(1.0)).unwrap();
    until_true("all is well", || async { rig.client.get("/readyz").await.body == "ok\n" }).await;
    assert_eq!(rig.client.metric("pd_control_degraded").await, 0.0);
    assert_eq!(filter.poll(&rig.client, Duration::ZERO).await, None);
    fs::write(rig.file(), four(2.0)).unwrap();
    filter.until_weight(&rig.client, 2.0).await;
    assert_eq!((filter.version, rig.client.metric("pd_control_refusals_total").await), (2, 2.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn saving_in_two_steps_is_no_refusal() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    for weight in [2.0, 3.0, 4.0] {
        // A shell's `> file` and then `>> file`.
        fs::write(rig.file(), "").unwrap();
        fs::write(rig.file(), four(weight)).unwrap();
        filter.until_weight(&rig.client, weight).await;
    }
    assert_eq!(rig.client.metric("pd_control_refusals_total").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_file_leaves_the_list_in_force_until_it_is_back() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    fs::remove_file(rig.file()).unwrap();
    until_true("the loss is noticed", || async { rig.client.get("/readyz").await.body.contains("cannot be read") })
        .await;
    assert_eq!(filter.poll(&rig.client, Duration::ZERO).await, None);
    fs::write(rig.file(), four(2.0)).unwrap();
    filter.until_weight(&rig.client, 2.0).await;
    assert_eq!(rig.client.get("/readyz").await.body, "ok\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_list_is_published_when_the_file_says_so() {
    let rig = Rig::start(&four(1.0)).await;
    let mut filter = rig.filter().await;
    fs::write(rig.file(), "endpoints: []\n").unwrap();
    filter.poll(&rig.client, PATIENCE).await.unwrap();
    assert!(filter.table.is_empty());
    assert_eq!(rig.client.get("/readyz").await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn comments_and_order_are_no_change() {
    let rig = Rig::start(&endpoints(&[(1, 1.0), (2, 1.0), (3, 1.0)])).await;
    let mut filter = rig.filter().await;
    replace(&rig.file(), &format!("# sorted\n{}", endpoints(&[(3, 1.0), (2, 1.0), (1, 1.0)]))).unwrap();
    assert_eq!(filter.poll(&rig.client, MOMENT).await, None);
    replace(&rig.file(), &endpoints(&[(3, 1.0), (2, 1.0), (1, 5.0)])).unwrap();
    filter.until_weight(&rig.client, 5.0).await;
    assert_eq!(filter.version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_does_not_report_is_found_by_looking() {
    let rig = Rig::start_with(&four(1.0), |config, _| config.poll = Duration::from_millis(20)).await;
    let mut filter = rig.filter().await;
    // Through another name of the file, in a directory that nobody watches.
    let elsewhere = rig.directory.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::hard_link(rig.file(), elsewhere.join("same")).unwrap();
    fs::write(elsewhere.join("same"), four(2.25)).unwrap();
    filter.until_weight(&rig.client, 2.25).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_replaced_is_followed() {
    let rig = Rig::start_with(&four(9.0), |config, root| {
        fs::create_dir(root.join("etc")).unwrap();
        let file = root.join("etc/endpoints.yaml");
        config.poll = Duration::from_millis(20);
        fs::write(&file, four(1.0)).unwrap();
        config.endpoints = Some(file);
    })
    .await;
    let mut filter = rig.filter().await;
    let root = rig.directory.path();
    fs::create_dir(root.join("new")).unwrap();
    fs::write(root.join("new/endpoints.yaml"), four(2.0)).unwrap();
    fs::rename(root.join("etc"), root.join("old")).unwrap();
    fs::rename(root.join("new"), root.join("etc")).unwrap();
    filter.until_weight(&rig.client, 2.0).await;
    replace(rig.config.endpoints.as_ref().unwrap(), &four(3.0)).unwrap();
    filter.until_weight(&rig.client, 3.0).await;
}
