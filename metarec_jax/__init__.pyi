from metarec_jax import baselines as baselines
from metarec_jax import data as data
from metarec_jax import learners as learners
from metarec_jax import losses as losses
from metarec_jax import models as models
from metarec_jax.baselines.tuning import fit_baselines as fit_baselines
from metarec_jax.core import Column as Column
from metarec_jax.core import Examples as Examples
from metarec_jax.core import Learner as Learner
from metarec_jax.core import MetarecError as MetarecError
from metarec_jax.core import MetarecWarning as MetarecWarning
from metarec_jax.core import Method as Method
from metarec_jax.core import Model as Model
from metarec_jax.core import Table as Table
from metarec_jax.core import Task as Task
from metarec_jax.cpu import tune_cpu as tune_cpu
from metarec_jax.data.catalogue import catalogue as catalogue
from metarec_jax.data.draw import task_source as task_source
from metarec_jax.data.interactions import Interactions as Interactions
from metarec_jax.data.io.datasets import load as load
from metarec_jax.data.io.published import read_partition as read_partition
from metarec_jax.data.io.readers import from_pandas as from_pandas
from metarec_jax.data.io.readers import read as read
from metarec_jax.data.splits import Split as Split
from metarec_jax.data.splits import split as split
from metarec_jax.data.synthetic import interactions as synthetic
from metarec_jax.data.tasks import make_tasks as make_tasks
from metarec_jax.evaluation import metrics as metrics
from metarec_jax.evaluation.evaluate import evaluate as evaluate
from metarec_jax.experiment.run import Run as Run
from metarec_jax.experiment.run import open_run as open_run
from metarec_jax.experiment.run import recipe as recipe
from metarec_jax.experiment.run import train as train
from metarec_jax.learners import warm_start as warm_start
from metarec_jax.report.write import write_report as write_report
from metarec_jax.serving.recommender import Recommender as Recommender
from metarec_jax.training.devices.sharding import make_mesh as make_mesh
from metarec_jax.training.loop import fit as fit

__all__ = [
    "Column",
    "Examples",
    "Interactions",
    "Learner",
    "MetarecError",
    "MetarecWarning",
    "Method",
    "Model",
    "Recommender",
    "Run",
    "Split",
    "Table",
    "Task",
    "baselines",
    "catalogue",
    "data",
    "evaluate",
    "fit",
    "fit_baselines",
    "from_pandas",
    "learners",
    "load",
    "losses",
    "make_mesh",
    "make_tasks",
    "metrics",
    "models",
    "open_run",
    "read",
    "read_partition",
    "recipe",
    "split",
    "synthetic",
    "task_source",
    "train",
    "tune_cpu",
    "warm_start",
    "write_report",
]
