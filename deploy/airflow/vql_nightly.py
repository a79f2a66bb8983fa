"""An example of a nightly release by Airflow 3. Not tested: no Airflow has run it; its commands are checked.

Every task is a command of `vql`, or of kubectl, as deploy/UPGRADE.md has them: nothing here is more than an order. Each
may be killed and repeated, but for the promotion: what a person rolled back meanwhile must not come back by itself.
The worker needs vql (the image vql-trainer), the volumes of kubernetes/base/jobs.yaml under the same paths, and the
writer's settings of Redis; for a cluster, another --master.

The training leaves the last day to the gate. It begins with the live release; the very first one is made by hand. A new
release needs a stream of its own: blue and green take turns, so set the parameter `stream` to the one that is free.
"""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    "vql_nightly",
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    params={"stream": "vql-stream-green"},
    default_args={"retries": 3, "retry_delay": timedelta(minutes=5)},
):
    train = BashOperator(
        task_id="train",
        bash_command="vql train --log /log --checkpoint /checkpoint/{{ ds_nodash }} --work /work --serving-delay 5s "
        "--before-ms {{ data_interval_start.int_timestamp }}000 "
        "--warm-start /checkpoint/releases --codebook relearn --master 'local[4]'",
        execution_timeout=timedelta(hours=8),
    )
    encode_items = BashOperator(
        task_id="encode_items",
        bash_command="vql encode-items --checkpoint /checkpoint/{{ ds_nodash }} --log /log --master 'local[4]'",
    )
    add = BashOperator(
        task_id="add",
        bash_command="vql release add /checkpoint/{{ ds_nodash }} --releases /checkpoint/releases",
    )
    # Refused is refused: its exit code is 8 however often it is asked.
    gate = BashOperator(
        task_id="gate",
        bash_command="vql release gate /checkpoint/{{ ds_nodash }} --releases /checkpoint/releases --log /log "
        "--work /work --master 'local[4]'",
        retries=0,
    )
    backfill = BashOperator(
        task_id="backfill",
        bash_command="vql release backfill /checkpoint/{{ ds_nodash }} --releases /checkpoint/releases --log /log "
        "--state /state --master 'local[4]'",
    )
    stream = BashOperator(
        task_id="stream",
        bash_command="kubectl -n vql set env statefulset/{{ params.stream }} CHECKPOINT={{ ds_nodash }} "
        "&& kubectl -n vql rollout status statefulset/{{ params.stream }}",
    )
    shadow = BashOperator(
        task_id="shadow",
        bash_command="vql release shadow /checkpoint/{{ ds_nodash }} --releases /checkpoint/releases --state /state",
    )
    # An hour in which rankers ask it too (vql serve --shadow) and alerts may speak up.
    watch = BashOperator(task_id="watch", bash_command="sleep 3600", retries=0)
    audit = BashOperator(
        task_id="audit",
        bash_command="vql audit --checkpoint /checkpoint/{{ ds_nodash }} --log /log --state /state --store-sample 1000 "
        "--master 'local[4]'",
        retries=0,
    )
    promote = BashOperator(
        task_id="promote",
        bash_command="vql release promote /checkpoint/{{ ds_nodash }} --releases /checkpoint/releases --state /state",
        retries=0,
    )

    train >> encode_items >> add >> gate >> backfill >> stream >> shadow >> watch >> audit >> promote
