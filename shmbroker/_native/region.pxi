# region.pxi: included by _core.pyx
