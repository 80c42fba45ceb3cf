import time
from pathlib import Path
from tests.conftest import task, workflow
from tests.execution.test_recovery import line
def test_x(servers, sites, tmp_path):
    f=open("/tmp/w/ex/zz.log","w")
    def say(*a): print(*a,file=f,flush=True)
    site = sites(grace=1.0, lease=60.0)
    path = tmp_path / "x"
    with line(site.settings.database_url) as database, site.worker(concurrency=1, env={"PIPELINE_DATABASE_URL": database.url}):
        started = site.engine.execute_workflow(
            workflow(task("t", "site.wait_for_file", params={"path": str(path)}), task("next", after=("t",)))
        )
        site.until_running(started, "t")
        t=time.time(); database.cut(); path.touch()
        site.until(lambda: "trying again" in site.log("worker")); say("said", time.time()-t)
        database.mend()
        done = site.engine.wait(started, 60); say("done", time.time()-t)
        path.unlink()
        started = site.engine.execute_workflow(workflow(task("t", "site.wait_for_file", params={"path": str(path)})))
        site.until_running(started, "t"); say("running", time.time()-t)
        site.engine.cancel(started)
        site.engine.wait(started, 60); say("cancelled", time.time()-t)
    say("ended", time.time()-t)
    say(site.log("worker")[-5000:])
