use std::{future::pending, io};

use tokio::sync::oneshot;

use super::*;

fn scrape(tasks: &Tasks) -> String {
    let mut registry = Registry::default();
    tasks.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text
}

#[tokio::test]
async fn a_panic_is_counted_and_harms_nobody() {
    let tasks = Tasks::new();
    let (tell, told) = oneshot::channel();
    tasks.spawn("bad", async { panic!("on purpose") });
    tasks.spawn("good", async move { tell.send(()).unwrap() });
    told.await.unwrap();
    assert_eq!(tasks.join(Duration::from_secs(10)).await, 0);
    let text = scrape(&tasks);
    assert!(text.contains("weft_task_panics_total{name=\"bad\"} 1"), "{text}");
    assert!(text.contains("weft_tasks{name=\"good\"} 0"), "{text}");
}

/// Who waits for the tasks waits for all that they held too.
#[tokio::test]
async fn a_task_is_alive_until_what_it_held_is_gone() {
    struct Held(Tasks, Option<oneshot::Sender<usize>>);
    impl Drop for Held {
        fn drop(&mut self) {
            let alive = self.0.len();
            self.1.take().map(|tell| tell.send(alive));
        }
    }
    let tasks = Tasks::new();
    for panics in [false, true] {
        let (tell, told) = oneshot::channel();
        let held = Held(tasks.clone(), Some(tell));
        let task = tasks.spawn("holds", async move {
            if panics {
                panic!("on purpose");
            }
            pending::<()>().await;
            drop(held);
        });
        tokio::task::yield_now().await;
        task.abort();
        assert_eq!(told.await, Ok(1), "panics: {panics}");
    }
    assert_eq!(tasks.join(Duration::from_secs(10)).await, 0);
}

#[tokio::test]
async fn every_end_of_a_vital_task_is_seen() {
    let tasks = Tasks::new();
    tasks.vital("returns", async { Ok(()) });
    let end = tasks.ended().await;
    assert!(matches!((end.name, &end.outcome), ("returns", VitalOutcome::Completed)), "{end}");
    tasks.vital("fails", async { Err(io::Error::other("no luck").into()) });
    assert_eq!(tasks.ended().await.to_string(), "the task `fails` failed: no luck");
    tasks.vital("panics", async { panic!("on purpose") });
    let end = tasks.ended().await;
    assert!(matches!(&end.outcome, VitalOutcome::Panicked(message) if message == "on purpose"), "{end}");
    assert!(scrape(&tasks).contains("weft_task_panics_total{name=\"panics\"} 1"));
}

#[tokio::test]
async fn two_ends_before_anyone_looks_are_both_kept() {
    let tasks = Tasks::new();
    tasks.vital("one", async { Ok(()) });
    tasks.vital("two", async { Ok(()) });
    assert_eq!(tasks.join(Duration::from_secs(10)).await, 0);
    let mut names = [tasks.ended().await.name, tasks.ended().await.name];
    names.sort_unstable();
    assert_eq!(names, ["one", "two"]);
}

#[tokio::test(start_paused = true)]
async fn join_aborts_what_does_not_end() {
    let tasks = Tasks::new();
    let (held, dropped) = oneshot::channel::<()>();
    tasks.spawn("stuck", async move {
        let _held = held;
        pending::<()>().await;
    });
    tasks.spawn("ends", async {});
    assert_eq!(tasks.join(Duration::from_secs(5)).await, 1);
    assert!(dropped.await.is_err());
    assert!(tasks.is_empty());
}

#[tokio::test]
async fn an_aborted_task_is_no_longer_counted() {
    let tasks = Tasks::new();
    tasks.spawn("stuck", pending()).abort();
    assert_eq!(tasks.join(Duration::from_secs(10)).await, 0);
    assert!(scrape(&tasks).contains("weft_tasks{name=\"stuck\"} 0"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_short_tasks_leave_nothing() {
    let tasks = Tasks::new();
    for _ in 0..2_000 {
        tasks.spawn("short", async {});
    }
    assert_eq!(tasks.join(Duration::from_secs(30)).await, 0);
    assert!(tasks.is_empty());
}
