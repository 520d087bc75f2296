# record.pxi: included by _core.pyx
