"""A Ray cluster of two nodes with one core each: prints its address, kills a node at the first line on stdin."""

import sys

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
if sys.stdin.readline():
    second.kill_raylet(check_alive=False)
    print("killed", flush=True)
    sys.stdin.readline()
cluster.shutdown()
