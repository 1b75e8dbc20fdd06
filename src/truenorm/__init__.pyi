from . import archive as archive
from . import callbacks as callbacks
from . import cluster as cluster
from . import report as report
from ._diagnosis.diagnose import diagnose as diagnose
from ._errors import (
    ArchiveError as ArchiveError,
)
from ._errors import (
    DataError as DataError,
)
from ._errors import (
    DistributedError as DistributedError,
)
from ._errors import (
    KerasVersionError as KerasVersionError,
)
from ._errors import (
    MissingDependencyError as MissingDependencyError,
)
from ._errors import (
    ModelError as ModelError,
)
from ._errors import (
    OptionError as OptionError,
)
from ._errors import (
    OutputError as OutputError,
)
from ._errors import (
    StudyError as StudyError,
)
from ._errors import (
    TruenormError as TruenormError,
)
from ._errors import (
    VerificationError as VerificationError,
)
from ._layer.batch_normalization import BatchNormalization as BatchNormalization
from ._layer.domains import domain as domain
from ._layer.recomputation import remat as remat
from ._modes.freeze import freeze as freeze
from ._modes.freeze import unfreeze as unfreeze
from ._modes.inspect import inspect as inspect
from ._modes.observe import observe as observe
from ._records.diagnosis import Diagnosis as Diagnosis
from ._records.diagnosis import Finding as Finding
from ._records.freezing import Freezing as Freezing
from ._records.inspection import Inspection as Inspection
from ._records.moments import Moments as Moments
from ._records.monitoring import Monitoring as Monitoring
from ._records.observation import Observation as Observation
from ._records.population import Population as Population
from ._records.recalibration import Recalibration as Recalibration
from ._records.rewrite import Rewrite as Rewrite
from ._records.site import Site as Site
from ._records.study import Study as Study
from ._records.synchronization import Synchronization as Synchronization
from ._rewrites.fold import fold as fold
from ._rewrites.place import place as place
from ._rewrites.replace import replace as replace
from ._statistics.adapt import adapt as adapt
from ._statistics.collect import collect as collect
from ._statistics.recalibrate import recalibrate as recalibrate
from ._statistics.synchronize import sync_statistics as sync_statistics
from ._study import Variant as Variant
from ._study import study as study

__version__: str
