//! From files to a page and its plots.

use serde_json::json;

use super::*;

const PAGE: &str = "Words.\n<!-- begin:gateway -->\nold\n<!-- end:gateway -->\nMore.\n<!-- begin:failover -->\n<!-- end:failover -->\n\
    <!-- begin:raft -->\n<!-- end:raft -->\n<!-- begin:agents -->\n<!-- end:agents -->\n";

/// A folder with a page, and with these results.
fn folder(test: &str, files: &[(&str, serde_json::Value)]) -> Args {
    let root = std::env::temp_dir().join(format!("isthmus-bench-page-{test}-{}", std::process::id()));
    let (from, docs) = (root.join("results"), root.join("docs"));
    for folder in [&from, &docs] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(docs.join("benchmarks.md"), PAGE).unwrap();
    for (name, value) in files {
        fs::write(from.join(name), value.to_string()).unwrap();
    }
    Args { from, docs }
}

fn gateway_files() -> [(&'static str, serde_json::Value); 2] {
    let metric = |group, quantity: &str, params: serde_json::Value, unit, better, rounds: serde_json::Value| json!({ "group": group, "quantity": quantity, "params": params, "unit": unit, "better": better, "rounds": rounds });
    let latency = |quantile: &str, ours: f64| {
        let rounds = json!({ "envoy-h2": [400.0, 410.0, 405.0], "ours-quic": [ours, ours, ours] });
        metric("rr", &format!("latency {quantile}"), json!({ "connections": 1000 }), "µs", "lower", rounds)
    };
    let bulk = json!({ "raw": [4e10, 4e10, 4e10], "envoy-h2": [3e9, 3.2e9, 3.1e9], "ours-quic": [5e9, null, 5e9] });
    let raw = json!({
        "quick": false, "notes": ["ours-tcp is left out"],
        "metrics": [
            metric("bulk", "throughput server to client", json!({ "streams": 8 }), "bit/s", "higher", bulk),
            latency("p50", 100.0), latency("p99", 500.0), latency("p99.9", 900.0),
        ],
    });
    let row = |group: &str, metric: &str, better: &str, ratio: f64, goal: Option<f64>, holds: Option<bool>| {
        json!({
            "group": group, "metric": metric, "params": {}, "unit": "µs", "better": better, "ours_name": "ours-quic",
            "ours": 500.0, "rival": 405.0, "rival_name": "envoy-h2", "ratio": ratio, "goal": goal, "holds": holds,
            "systems": { "envoy-h2": 405.0, "ours-quic": 500.0 }, "rounds": 3,
        })
    };
    let rows = json!([
        row("rr", "latency p99, 1,000 connections", "lower", 1.23, Some(1.0), Some(false)),
        row("bulk", "throughput, 8 streams", "higher", 1.6, Some(1.5), Some(true)),
        row("rr", "requests", "higher", 0.5, None, None),
    ]);
    [("gateway-raw.json", raw), ("gateway.json", rows)]
}

#[test]
fn blocks_are_filled_in_and_the_words_around_them_stay() {
    let args = folder("gateway", &gateway_files());
    run(&args).unwrap();
    run(&args).unwrap();
    let text = fs::read_to_string(args.docs.join("benchmarks.md")).unwrap();
    let latency = fs::read_to_string(args.docs.join("benchmarks/gateway-latency.svg")).unwrap();
    let throughput = fs::read_to_string(args.docs.join("benchmarks/gateway-throughput.svg")).unwrap();
    fs::remove_dir_all(args.docs.parent().unwrap()).unwrap();

    assert!(text.starts_with("Words.\n<!-- begin:gateway -->\n") && !text.contains("old"), "{text}");
    assert!(text.contains("<!-- end:gateway -->\nMore.\n<!-- begin:failover -->\n<!-- end:failover -->\n"), "{text}");
    assert_eq!(text.matches("### Goals").count(), 1, "a second run replaces the first's block");
    assert!(text.contains("1 of 2 held.") && text.contains("1 are won or even, 2 lost:"), "{text}");
    let (requests, p99) =
        (text.find("| requests |").unwrap(), text.rfind("| latency p99, 1,000 connections |").unwrap());
    assert!(requests < p99, "the worst loss comes first:\n{text}");
    assert!(text.contains("(benchmarks/gateway-latency.svg)"), "{text}");
    assert!(latency.contains("500 µs") && latency.contains("1,000 connections"), "{latency}");
    assert!(throughput.contains("3.10 Gbit/s") && throughput.contains("40.0 Gbit/s"), "{throughput}");
    assert!(throughput.contains(">failed<"), "a round without a value leaves no median:\n{throughput}");
}

#[test]
fn a_page_without_its_marks_is_left_as_it_is() {
    let args = folder("marks", &gateway_files());
    let page = args.docs.join("benchmarks.md");
    fs::write(&page, "Only words. <!-- end:gateway --> <!-- begin:gateway -->").unwrap();
    let error = format!("{:#}", run(&args).unwrap_err());
    let text = fs::read_to_string(&page).unwrap();
    fs::remove_dir_all(args.docs.parent().unwrap()).unwrap();
    assert!(error.contains("<!-- begin:gateway -->"), "{error}");
    assert!(text.starts_with("Only words."));
}

#[test]
fn without_results_it_says_how_to_get_them() {
    let args = folder("none", &[]);
    let error = run(&args).unwrap_err().to_string();
    fs::remove_dir_all(args.docs.parent().unwrap()).unwrap();
    assert!(error.contains("isthmus-bench gateway"), "{error}");
}

#[test]
fn faults_are_summed_up_by_medians_and_losses_are_named() {
    let fault = |round: u32, system: &str, failed: u64, last: u64| {
        let timeline = json!([{ "at_ms": -100, "ok": 50, "slow": 0, "failed": 0, "max_ms": 3 },
                              { "at_ms": 0, "ok": 40, "slow": 0, "failed": failed, "max_ms": last }]);
        json!({ "round": round, "system": system, "fault": "kill", "scope": "gateway", "victims": [], "requests": 500,
                "failed": failed, "slow": 0, "last_affected_ms": last, "settled": system != "istio", "timeline": timeline })
    };
    let raw: Vec<_> = [(1, 0, 700), (2, 3, 800), (3, 0, 900)]
        .into_iter()
        .flat_map(|(round, failed, last)| [fault(round, "ours", failed, last), fault(round, "istio", 9, last - 200)])
        .collect();
    let verdicts =
        json!([{ "metric": "failover.kill.gateway.failed", "goal": "0 failed", "holds": false, "ratio": null }]);
    let args = folder("failover", &[("failover-raw.json", json!(raw)), ("failover.json", verdicts)]);
    run(&args).unwrap();
    let text = fs::read_to_string(args.docs.join("benchmarks.md")).unwrap();
    let svg = fs::read_to_string(args.docs.join("benchmarks/failover-timeline.svg")).unwrap();
    fs::remove_dir_all(args.docs.parent().unwrap()).unwrap();

    assert!(text.contains("<!-- begin:gateway -->\nold\n"), "the other block was not measured:\n{text}");
    let line = "| kill of a gateway | 0 (worst 3) / 0 / 800 ms | 9 / 0 / ≥ 600 ms | 0 failed | **no** |";
    assert!(text.contains(line), "{text}");
    assert!(text.contains("its last affected request sooner, after 600 ms against 800 ms"), "{text}");
    assert!(!text.contains("fewer failures"), "{text}");
    // The round in the middle by its end, not by its failures.
    assert!(svg.contains("3 failed, 0 slow, last after 0.80 s"), "{svg}");
    assert!(svg.contains("kill -9 of a gateway"), "{svg}");
}

#[test]
fn the_control_plane_is_shown_beside_its_rival_or_against_its_limits() {
    let series = |quantity: &str, params: serde_json::Value, unit: &str, rounds: serde_json::Value| {
        let group = if params.get("agents").is_some() { "agents" } else { "raft" };
        json!({ "group": group, "quantity": quantity, "params": params, "unit": unit, "better": "lower", "rounds": rounds })
    };
    let p = |quantile: &str| {
        series(
            &format!("latency {quantile}"),
            json!({ "writers": 64 }),
            "µs",
            json!({ "ours": [900.0], "etcd": [1200.0] }),
        )
    };
    let memory = |agents: u64, bytes: f64| {
        series("memory of a node", json!({ "agents": agents }), "bytes", json!({ "ours": [bytes] }))
    };
    let row = |metric: &str, unit: &str, systems: serde_json::Value, ratio: Option<f64>, goal: f64| {
        let rival = ratio.map(|_| "etcd");
        json!({ "group": "raft", "metric": metric, "unit": unit, "better": "lower", "ours_name": "ours", "rival_name": rival,
                "ratio": ratio, "goal": goal, "holds": true, "systems": systems })
    };
    let raft = json!({ "quick": true, "notes": ["the disk is slow"], "metrics": [p("p50"), p("p99")] });
    let beside = row("latency p99, 64 writers", "µs", json!({ "ours": 900.0, "etcd": 1200.0 }), Some(0.75), 1.0);
    let agents = json!({ "quick": false, "notes": [], "metrics": [memory(10, 3e7), memory(1_000, 4e8)] });
    let alone = row("memory of a node, 1,000 agents", "bytes", json!({ "ours": 4e8 }), None, 1_073_741_824.0);
    let args = folder(
        "control",
        &[
            ("raft-raw.json", raft),
            ("raft.json", json!([beside])),
            ("agents-raw.json", agents),
            ("agents.json", json!([alone])),
        ],
    );
    run(&args).unwrap();
    let text = fs::read_to_string(args.docs.join("benchmarks.md")).unwrap();
    let growth = fs::read_to_string(args.docs.join("benchmarks/agents-growth.svg")).unwrap();
    let latency = fs::read_to_string(args.docs.join("benchmarks/raft-latency.svg")).unwrap();
    fs::remove_dir_all(args.docs.parent().unwrap()).unwrap();

    assert!(text.contains("the disk is slow") && text.contains("1 of 1 goals held."), "{text}");
    assert!(text.contains("| latency p99, 64 writers [µs] | 900 | 1,200 | 0.75 | ≤ 1 | yes |"), "{text}");
    assert!(text.contains("| memory of a node, 1,000 agents [KiB] | 390,625 | ≤ 1,048,576 KiB | yes |"), "{text}");
    assert!(growth.contains("memory of a node") && growth.contains("1,000"), "{growth}");
    assert!(latency.contains("etcd") && latency.contains("64 writers"), "{latency}");
}
